"""The works of the engine's benchmark: what each runs and how its figure comes about. See engine.py."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from roofline import Roofline

from lightllmctl.workload import SHAREGPT_INPUT, SHAREGPT_OUTPUT, Lengths, draw_ids, draw_lengths
from lightllmd import LLM

NEW_TOKENS = 128  # whose mean time is a decode step's
UNIFORM = Lengths(100, 1024)
HOST_PHASES = {"schedule": "next_step", "launch": "launch", "wait": "collect", "complete": "complete"}


class Host:
    """Where the CPU's time goes: the four phases of a turn, clocked on these objects only."""

    def __init__(self, llm: LLM) -> None:
        self._seconds = dict.fromkeys(HOST_PHASES, 0.0)
        self._steps = 0
        for phase, method in HOST_PHASES.items():
            owner = llm._scheduler if phase in ("schedule", "complete") else llm._runner
            setattr(owner, method, self._clocked(phase, getattr(owner, method)))

    def _clocked(self, phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*arguments: Any) -> Any:
            begun = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                self._seconds[phase] += time.perf_counter() - begun
                self._steps += phase == "launch"

        return clocked

    def take(self) -> dict[str, float]:
        """Milliseconds per step since the last call."""
        taken = {phase: round(1e3 * seconds / max(1, self._steps), 3) for phase, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(HOST_PHASES, 0.0)
        self._steps = 0
        return taken


@dataclass
class Result:
    work: str
    value: float
    unit: str  # "ms" and "s": less is better; else a rate
    limit: float | None
    host: dict[str, float]
    more: dict[str, Any]


class Bench:
    """Runs works in one engine. Each method returns what it measured."""

    def __init__(self, llm: LLM, roofline: Roofline | None, repeats: int | None) -> None:
        self._llm, self._roofline, self._repeats = llm, roofline, repeats
        self._source = random.Random(0)
        self._host = Host(llm)

    def prompts(self, lengths: list[int]) -> list[list[int]]:
        return [draw_ids(length, self._llm.plan.vocab_size, self._source) for length in lengths]

    def seconds(self, prompts: list[list[int]], new: int | list[int], max_running: int | None = None) -> float:
        """Of one call; `new` tokens for each, or each its own number."""
        each = new if isinstance(new, list) else [new] * len(prompts)
        parameters = [{"max_new_tokens": tokens} for tokens in each]
        begun = time.perf_counter()
        outputs = self._llm.generate(
            prompt_token_ids=prompts,
            parameters=parameters,
            ignore_eos=True,
            detokenize=False,
            progress=False,
            max_running=max_running,
        )
        taken = time.perf_counter() - begun
        if [len(output.token_ids) for output in outputs] != each:
            raise SystemExit("the engine made another number of tokens than it was asked for")
        return taken

    def holds(self, batch: int, context: int) -> bool:
        """The whole batch can run at a time."""
        return batch * (context + NEW_TOKENS + 1) < self._llm.plan.max_total_token_num

    def decode(self, batch: int, context: int) -> Result:
        prompts = self.prompts([context] * batch)
        repeats = range(self._repeats or 2)
        first = min(self.seconds(prompts, 1) for _ in repeats)
        self._host.take()
        whole = min(self.seconds(prompts, 1 + NEW_TOKENS) for _ in repeats)
        limit = self._roofline and 1e3 * self._roofline.decode(batch, context + NEW_TOKENS / 2)
        value = 1e3 * (whole - first) / NEW_TOKENS
        return Result(f"decode {batch} @ {context}", value, "ms", limit, self._host.take(), {})

    def prefill(self, count: int, tokens: int) -> Result:
        prompts = self.prompts([tokens] * count)
        self._host.take()
        best = min(self.seconds(prompts, 1) for _ in range(self._repeats or 3))
        limit = self._roofline and self._roofline.prefill([tokens] * count)
        work, host = f"prefill {count}x{tokens}", self._host.take()
        if count == 1:
            return Result(work, 1e3 * best, "ms", limit and 1e3 * limit, host, {})
        total = count * tokens
        return Result(work, total / best, "tokens/s", limit and total / limit, host, {"ms": round(1e3 * best, 2)})

    def mix(self, lengths: list[tuple[int, int]], rows: int) -> Iterator[tuple[float, float | None, str, dict]]:
        """(rate, limit, unit, host) in output tokens/s, then in requests/s; all submitted at once."""
        prompts = self.prompts([fed for fed, _ in lengths])
        new = [tokens for _, tokens in lengths]
        self._host.take()
        taken = statistics.median(self.seconds(prompts, new, rows) for _ in range(self._repeats or 1))
        limit, host = self._roofline and self._roofline.mix(lengths, rows), self._host.take()
        for amount, unit in ((sum(new), "tokens/s"), (len(lengths), "requests/s")):
            yield amount / taken, limit and amount / limit, unit, host

    def uniform(self, rows: int) -> Result:
        rate, limit, unit, host = next(self.mix(draw_lengths(UNIFORM, UNIFORM, 256, 0), rows))
        return Result("uniform", rate, unit, limit, host, {"rows": rows})

    def sharegpt(self, rows: int) -> Iterator[Result]:
        lengths = draw_lengths(SHAREGPT_INPUT, SHAREGPT_OUTPUT, 1000, 1)
        for rate, limit, unit, host in self.mix(lengths, rows):
            work = f"sharegpt {unit.removesuffix('/s')}, {rows} rows"
            yield Result(work, rate, unit, limit, host, {"rows": rows})

    def profile(self, batch: int, context: int, prefill: int, steps: int = 16) -> str:
        """Kernels by device time: `steps` decode steps in the middle of a run, then one prefill."""
        from kernel_times import KernelTimes  # it imports torch, before which the engine settles torch's threads

        times = KernelTimes(self._llm._runner, self._llm.plan.device.kind)
        with times.window(lambda step: step.kind == "decode", skip=24, steps=steps):
            self.seconds(self.prompts([context] * batch), 24 + 2 * steps)
        decode = times.table(f"decode, batch {batch} at context {context}, per step")
        layer = times.layer()
        prompts = self.prompts([prefill])
        self.seconds(prompts, 1)
        with times.window(lambda step: step.kind == "prefill", skip=0, steps=1):
            self.seconds(prompts, 2)
        filled = times.table(f"prefill of {prefill} tokens")
        return "\n\n".join([decode, layer, filled, times.layer()])
