"""What each kernel reaches on one GPU: GB/s or TFLOP/s, each result checked against torch before it is timed.

``python tests/bench/kernels.py [--only attention,split] [--shape 8b|0.6b|…|8b/2] [--sweep] [--rows 1,8] [--check]``

One ``RESULT {json}`` line per measurement, a table at the end. `--sweep` times the candidate tiles of the dense
products (for `kernels/tiles.py`), of decode attention, of quantised KV caches too (``--only kv``), and of matmuls in 8
bits (for `kernels/w8a8_tiles.py`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from cases.timing import Report

SECTIONS = ("small", "sampling", "attention", "split", "kv", "dense", "packed", "w8a8")


def main() -> None:
    parser = argparse.ArgumentParser(description="achieved GB/s and TFLOP/s of the kernels")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--shape", choices=["8b", "0.6b", "135m", "8b/2", "70b/2"], default="8b")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,256", help="of x in the matmuls")
    parser.add_argument("--check", action="store_true", help="kv, packed, w8a8: results alone, no times")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"unknown sections {sorted(unknown)}")
    torch.manual_seed(0)
    report = Report()
    report.result("device", name=torch.cuda.get_device_name(), torch=torch.__version__, shape=arguments.shape)
    # Imported when asked for, so that one section can be measured while another's kernels are being worked on.
    if "small" in wanted:
        with report.case("small"):
            from cases import small

            small.measure(arguments.shape, report)
    if "sampling" in wanted:
        with report.case("sampling"):
            from cases import sampling

            sampling.measure(report)
    if "attention" in wanted:
        with report.case("attention"):
            from cases import attention

            attention.measure(arguments.shape, arguments.sweep, report)
    if "split" in wanted:
        with report.case("split"):
            from cases import split

            split.measure(arguments.shape, report)
    if "kv" in wanted:
        with report.case("kv"):
            from cases import quantised_kv

            quantised_kv.measure(arguments.shape, arguments.sweep, arguments.check, report)
    if "dense" in wanted:
        with report.case("dense"):
            from cases import dense

            dense.measure(arguments.shape, tuple(map(int, arguments.rows.split(","))), arguments.sweep, report)
    if "packed" in wanted:
        with report.case("packed"):
            from cases import packed

            packed.measure(arguments.shape, tuple(map(int, arguments.rows.split(","))), arguments.check, report)
    if "w8a8" in wanted:
        with report.case("w8a8"):
            from cases import w8a8

            rows = tuple(map(int, arguments.rows.split(",")))
            w8a8.measure(arguments.shape, rows, arguments.sweep, arguments.check, report)
    report.table()


if __name__ == "__main__":
    main()
