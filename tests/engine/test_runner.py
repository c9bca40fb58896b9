"""What a step gives back, and what it does when something is wrong."""

from __future__ import annotations

import math
import random
from pathlib import Path

import msgspec
import pytest
import torch

from lightllmd.config.bounds import GATHER_PADDING, LOGIT_ROWS, SHORT_ROW
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.step import Row, Step
from lightllmd.errors import OutOfMemory
from lightllmd.ipc.messages import SamplingParams
from tiny_models import Driver, load, plan_for, write_model

IDS = [3, 14, 15, 92, 65, 35]


@pytest.fixture
def runner(tmp_path: Path) -> CpuRunner:
    return load(write_model(tmp_path))


def test_only_sampling_rows_have_a_result_and_they_keep_their_order(runner: CpuRunner) -> None:
    driver = Driver(runner)
    rows = [driver.row(0, IDS), driver.row(1, IDS[:3], sample=False), driver.row(2, IDS[:1]), driver.row(3, IDS[:4])]
    result = runner.run(driver.step(*rows), lambda: None)
    assert len(result.tokens) == len(result.logprobs) == len(result.alternatives) == 3
    for index, ids in ((0, IDS), (1, IDS[:1]), (2, IDS[:4])):
        alone = Driver(runner)
        logits = alone.logits(alone.row(9, ids))[0][-1]
        assert result.tokens[index] == logits.argmax().item()
        assert result.logprobs[index] == pytest.approx(logits.log_softmax(-1).max().item(), abs=1e-4)


def test_a_step_of_more_rows_than_fit_the_logits_workspace_equals_small_ones(tmp_path: Path) -> None:
    count = LOGIT_ROWS * 2 + 3
    runner = load(write_model(tmp_path), running_max_req_size=count, slots=2048)
    driver = Driver(runner, scattered=True)
    together = runner.run(driver.step(*[driver.row(n, [n % 128, 5, n % 7]) for n in range(count)]), lambda: None)
    fed = [driver.row(n, [together.tokens[n]], 1) for n in range(count)]
    second = runner.run(driver.step(*fed), lambda: None)
    for number in (0, LOGIT_ROWS - 1, LOGIT_ROWS, count - 1):
        alone = Driver(runner)
        first = runner.run(alone.step(alone.row(0, [number % 128, 5, number % 7])), lambda: None)
        assert first.tokens == [together.tokens[number]]
        assert runner.run(alone.step(alone.row(0, first.tokens, 1)), lambda: None).tokens == [second.tokens[number]]


@torch.inference_mode()
def test_rows_read_together_are_padded_within_what_the_budget_plans(tmp_path: Path) -> None:
    draw = random.Random(7)
    runner = load(write_model(tmp_path), slots=64, max_req_total_len=2000, max_req_input_len=1000)
    for _ in range(50):
        lengths = [draw.choice([1, 3, 100, SHORT_ROW, 129, 500, 1999]) for _ in range(draw.randrange(2, 9))]
        rows = [Row(n, n, 0, length - 1, [1], [n], True, 1, None) for n, length in enumerate(lengths)]
        packed = runner.table.pack(rows, runner.decoder.rope)
        for group in packed.metadata.decode:
            members = range(len(rows)) if group.tokens is None else group.tokens.tolist()
            held = [lengths[member] for member in members]
            assert len(held) * max(held) <= max(GATHER_PADDING * sum(held), len(held) * SHORT_ROW)


@torch.inference_mode()
def test_rows_that_share_slots_are_gathered_within_what_the_budget_plans(tmp_path: Path) -> None:
    """Together they may hold many times the tokens that there are slots for."""
    slots = 600
    runner = load(write_model(tmp_path), slots=slots, max_req_total_len=600, max_req_input_len=500)
    shared = list(range(500))
    rows = [Row(n, n, 0, 500, [1], [500 + n], True, 1, None, past=shared) for n in range(16)]
    packed = runner.table.pack(rows, runner.decoder.rope)
    gathered = [len(group.slots) for group in packed.metadata.decode if isinstance(group.slots, torch.Tensor)]
    assert len(gathered) > 1
    assert max(gathered) <= GATHER_PADDING * slots
    served = [row for group in packed.metadata.decode if group.tokens is not None for row in group.tokens.tolist()]
    assert sorted(served) == list(range(16))


@torch.inference_mode()
def test_rows_are_read_as_runs_where_their_slots_are_one_and_by_number_elsewhere(runner: CpuRunner) -> None:
    """Whatever of them was cached, or entered with another step."""
    draw, runs = random.Random(3), 0
    for _ in range(300):
        begin, length = draw.randrange(200), draw.randint(3, 30)
        slots = list(range(begin, begin + length))
        if draw.random() < 0.5:
            first, second = sorted(draw.sample(range(length), 2))
            slots[first], slots[second] = slots[second], slots[first]
        whole = slots == sorted(slots)
        cached = draw.randrange(length - 1)
        past, start = slots[:cached], cached
        for end in sorted({draw.randint(cached + 1, length), length}):
            row = Row(4, 4, 0, start, [1] * (end - start), slots[start:end], True, 0, None, past=past)
            metadata = runner.table.pack([row], runner.decoder.rope).metadata
            read = metadata.prefill[0].slots if metadata.prefill else metadata.decode[0].slots
            if isinstance(read, slice):
                runs += 1
                assert list(range(read.start, read.stop)) == slots[:end]
            else:
                assert read.tolist() == slots[:end]
                assert not whole, "a run is read without its numbers"
            past, start = None, end
    assert runs > 100


def test_a_beat_comes_with_every_layer(runner: CpuRunner) -> None:
    driver, beats = Driver(runner), []
    runner.run(driver.step(driver.row(0, IDS)), lambda: beats.append(None))
    assert len(beats) >= len(runner.decoder.spec.layers)


def test_logits_that_are_no_numbers_are_told_of_their_row_alone(runner: CpuRunner) -> None:
    driver = Driver(runner)
    with torch.inference_mode():
        runner.decoder.tensors()["embed"][92] = float("nan")
    assert 92 in IDS
    result = runner.run(driver.step(driver.row(4, IDS), driver.row(5, [1, 2, 3])), lambda: None)
    assert [math.isnan(logprob) for logprob in result.logprobs] == [True, False]


def test_memory_that_does_not_suffice_is_told_as_such(tmp_path: Path) -> None:
    plan = msgspec.structs.replace(plan_for(write_model(tmp_path)), max_total_token_num=1 << 45)
    with pytest.raises(OutOfMemory):
        CpuRunner().load(plan, lambda done, total: None)


def test_memory_is_measured(runner: CpuRunner) -> None:
    driver = Driver(runner)
    runner.run(driver.step(driver.row(0, IDS)), lambda: None)
    stats = runner.memory_stats()
    assert stats["memory_used"] > 0
    assert stats.keys() == {"memory_loaded", "memory_worst_step", "memory_used"}


def test_steps_survive_their_serialisation(runner: CpuRunner) -> None:
    """A step is all that a rank of a tensor-parallel group would get."""
    driver = Driver(runner)
    step = driver.step(driver.row(0, IDS, params=SamplingParams(do_sample=True, seed=5, top_p=0.9)))
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(step), type=Step)
    assert runner.run(step, lambda: None) == runner.run(copy, lambda: None)
