"""The engine's speed through the offline interface, beside the card's limits and a peer's figures.

``python tests/bench/engine.py --model DIR [--work decode,prefill,uniform,sharegpt] [--mode NAME,…] [--set KEY=VALUE]
[--tp N] [--replicas M] [--profile FILE]``

Greedy, ignore_eos, token ids in and out. A directory with no weights gets random ones (``--load-way DUMMY``).

* *decode*: `batch` prompts of `context` random ids; the time of 129 new tokens minus that of 1, over 128; the best of
  each out of two.
* *prefill*: the time of one new token; best of three. Several prompts at once are told as tokens/s.
* *uniform*: 256 requests, 100 to 1024 tokens in and out, ``random.Random(0)``.
* *sharegpt*: 1000 requests of ShareGPT-like lengths, ``random.Random(1)``, all submitted at once, with so many rows.

All works run in one engine that is loaded once. The mixes report the median of `--repeats`. `host` in a RESULT line:
milliseconds per step that the CPU spends in the scheduler, in launching, in waiting for the device and in completing.

``--tp N``: of a group of N ranks; limits are those of N cards that need not talk, and ``--profile`` tells that, in
all and in one layer. ``--replicas M``: M engines at once, each on GPUs of its own; see several.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))

from anchors import PLAIN, anchors_of
from roofline import Card, Roofline, card_of
from settings import load_way, settings
from several import gate, run_several
from works import HOST_PHASES, Bench, Result

from lightllmd import LLM
from lightllmd.config.plan import Plan
from lightllmd.errors import LightllmdError

WORKS = ("decode", "prefill", "uniform", "sharegpt")
BATCHES = {512: (1, 8, 32, 128, 256), 4096: (1, 16, 64)}  # measured by the peer, by context


# --- command line -------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def prefills(text: str) -> list[tuple[int, int]]:
    """128,16x2048 -> (1, 128), (16, 2048)"""
    pairs = [part.split("x") for part in text.split(",")]
    return [(int(pair[0]) if len(pair) > 1 else 1, int(pair[-1])) for pair in pairs]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", default=",".join(WORKS))
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=1, help="engines at once")
    parser.add_argument("--gated", action="store_true", help=argparse.SUPPRESS)  # of each of several
    parser.add_argument("--mode", default="", help="names of modes, with commas")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load-way", choices=["HF", "DUMMY"], help="default: DUMMY where there are no weights")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batches", type=numbers, help="default: 1,8,32,128,256; 1,16,64 at 4096")
    parser.add_argument("--context", type=numbers, default=[512, 4096])
    parser.add_argument("--prefills", type=prefills, default=prefills("128,2048,8192,16x2048"))
    parser.add_argument("--rows", type=int, default=256, help="rows of decode, prefill and uniform")
    parser.add_argument("--sharegpt-rows", type=numbers, default=[256, 1000])
    parser.add_argument("--length", type=int, default=16384, help="max_req_total_len; at most the model's context")
    parser.add_argument("--repeats", type=int, help="default: decode 2, prefill 3, mixes 1")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting")
    parser.add_argument("--profile", type=Path, help="kernels by device time go to this file")
    parser.add_argument("--profile-batch", type=int, default=1)
    parser.add_argument("--profile-context", type=int, default=512)
    parser.add_argument("--profile-prefill", type=int, default=2048)
    parser.add_argument("--commit", default="unknown", help="where there is no git")
    given = parser.parse_args()
    given.work = [work for work in given.work.split(",") if work]
    if unknown := set(given.work) - set(WORKS):
        parser.error(f"no such work: {', '.join(sorted(unknown))}; there are {', '.join(WORKS)}")
    return given


def open_llm(given: argparse.Namespace) -> LLM:
    """With as many rows as the widest work needs: fewer are a matter of admission alone."""
    folder = Path(given.model)
    length = given.length
    rows = max(
        given.rows,
        *(given.sharegpt_rows if "sharegpt" in given.work else [1]),
        *(count for count, _ in given.prefills),
        *(given.batches or [1]),
    )
    if (folder / "config.json").is_file():
        length = min(length, json.loads((folder / "config.json").read_bytes())["max_position_embeddings"])
    parameters = {
        "load_way": load_way(given.model, given.load_way),
        "tp": given.tp,
        "mode": [mode for mode in given.mode.split(",") if mode],
        "data_type": given.dtype,
        "device": given.device,
        "max_req_total_len": length,
        "max_req_input_len": length - 1,
        "running_max_req_size": rows,
        # All prompts of a batch are in it as soon as may be; with more rounds between two prefills the first ones
        # would be far ahead of the last.
        "router_max_wait_tokens": 1,
    }
    return LLM(given.model, **{**parameters, **settings(given.set)})


def run(bench: Bench, given: argparse.Namespace) -> Iterator[Result]:
    bench.seconds(bench.prompts([16, 16]), 4)
    if "decode" in given.work:
        for context in given.context:
            for batch in given.batches or BATCHES.get(context, BATCHES[512]):
                if bench.holds(batch, context):
                    yield bench.decode(batch, context)
                else:
                    print(f"decode {batch} @ {context}: skipped, the KV cache is too small for it", flush=True)
    if "prefill" in given.work:
        for count, tokens in given.prefills:
            yield bench.prefill(count, tokens)
    if "uniform" in given.work:
        yield bench.uniform(given.rows)
    if "sharegpt" in given.work:
        for rows in given.sharegpt_rows:
            yield from bench.sharegpt(rows)


def after_gates(works: Iterator[Result]) -> Iterator[Result]:
    while True:
        gate()
        result = next(works, None)
        if result is None:
            return
        yield result


def commit_of(otherwise: str) -> str:
    folder = Path(__file__).parent
    try:
        told = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=False
        )
    except OSError:
        return otherwise
    return told.stdout.strip() or otherwise


class Report:
    """RESULT lines as they come, then the table."""

    def __init__(self, given: argparse.Namespace, llm: LLM) -> None:
        plan = llm.plan
        mode, config = plan.config.params.mode, plan.model.hf_config if plan.model else {}
        self._facts = {
            "model": plan.model_name,
            "card": plan.device.name,
            "commit": commit_of(given.commit),
            "dtype": plan.data_type,
            "mode": mode,
            "tp": given.tp,
        }
        self._anchors = anchors_of(config, plan.device.name, plan.data_type, mode, given.tp)
        self._lines: list[tuple[str, ...]] = []

    def add(self, result: Result) -> None:
        peer, goal = self._anchors.get(result.work, (None, None))
        share = None
        if result.limit:
            ratio = result.limit / result.value
            share = round(100 * (ratio if result.unit in ("ms", "s") else 1 / ratio), 1)
        told = {
            "work": result.work,
            "value": round(result.value, 3),
            "unit": result.unit,
            "peer": peer,
            "goal": goal,
            "limit": result.limit and round(result.limit, 3),
            "percent_of_limit": share,
            **self._facts,
            "host_ms_per_step": result.host,
            **result.more,
        }
        print("RESULT", json.dumps(told), flush=True)
        digits = 2 if result.value < 1000 else 0
        value, *rest = (
            "" if number is None else f"{number:,.{digits}f}" for number in (result.value, result.limit, peer, goal)
        )
        limit, peer_said, goal_said = rest
        host = "  ".join(f"{time:.2f}" for time in result.host.values())
        self._lines.append((result.work, value, result.unit, host, limit, f"{share or ''}", peer_said, goal_said))

    def table(self) -> str:
        heads = ("work", "value", "unit", f"host ms ({', '.join(HOST_PHASES)})", "limit", "% limit", "peer", "goal")
        rows = [heads, *self._lines]
        widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
        aligned = "<><<>>>>"
        return "\n".join(
            "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths, strict=True)).rstrip()
            for row in rows
        )


def roofline_of(plan: Plan) -> Roofline | None:
    """None where a percentage would mean nothing."""
    params = plan.config.params
    card = card_of(plan.device.kind, plan.device.name, plan.data_type)
    if card is None or plan.model is None or plan.model.outline or not PLAIN.issuperset(params.mode):
        return None
    together = Card(card.name, params.tp * card.bandwidth, params.tp * card.arithmetic)
    return Roofline.of(plan.model.hf_config, 4 if plan.data_type == "float32" else 2, together)


@contextmanager
def problems_told() -> Iterator[None]:
    try:
        yield
    except LightllmdError as error:
        raise SystemExit(f"{error.name}: {error.message}") from None


def main() -> None:
    given = arguments()
    if given.replicas > 1 and not given.gated:
        run_several(sys.argv, given.replicas, given.tp)
        return
    with problems_told(), open_llm(given) as llm:
        ready = time.time() - psutil.Process().create_time()
        plan = llm.plan
        print(llm.memory_report(), flush=True)
        gc.collect()
        gc.freeze()  # as the daemon's engine does before it serves
        roofline = roofline_of(plan)
        report = Report(given, llm)
        report.add(Result("start", ready, "s", None, {}, {}))
        bench = Bench(llm, roofline, given.repeats)
        works = run(bench, given)
        if given.gated:
            works = after_gates(works)
        for result in works:
            report.add(result)
        print(f"\n{report.table()}", flush=True)
        if given.profile:
            text = bench.profile(given.profile_batch, given.profile_context, given.profile_prefill)
            given.profile.write_text(text + "\n")
            print(f"\n{text}")


if __name__ == "__main__":
    main()
