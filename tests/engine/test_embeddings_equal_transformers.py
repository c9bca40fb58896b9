"""Embeddings are made of transformers' last hidden states, whatever way their prompts take through the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from embedding_models import Engine, Truth, as_base_model, embedding_plan, prompts
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.runners.gpu import GpuRunner
from lightllmd.engine.runners.step_shapes import StepShapes
from lightllmd.ipc.messages import PoolingParams, SamplingParams, Submit
from lightllmd.models.hf.dry_run import outlined
from tiny_causal_lms import write_causal_lm
from tiny_models import DEVICE, VARIANTS, write_model

TOLERANCE = 1e-4
KINDS = {
    "last": PoolingParams(),
    "mean": PoolingParams(mean=True),
    "cls": PoolingParams([0]),
    "mean of 24 values, length 1": PoolingParams(mean=True, size=24, unit=True),
}
MODELS = ("plain", "tied", "qwen3", "gemma2", "qwen3 base")


class Case:
    """A model, with transformers' vectors of the prompts."""

    def __init__(self, folder: Path, name: str) -> None:
        self.base = name.endswith(" base")
        self.folder = write_model(folder, VARIANTS[name.removesuffix(" base")])
        if self.base:
            as_base_model(self.folder)
        truth = Truth(self.folder)
        self.truth = {kind: [truth.vector(prompt, params) for prompt in prompts()] for kind, params in KINDS.items()}

    def engine(self, **options: Any) -> Engine:
        plan = embedding_plan(self.folder, base=self.base, **options)
        runner = CpuRunner()
        runner.load(plan, lambda done, total: None)
        return Engine(plan, runner)


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("embedding"), request.param)


def close(ours: list[Tensor], theirs: list[Tensor], tolerance: float = TOLERANCE) -> None:
    assert [len(vector) for vector in ours] == [len(vector) for vector in theirs]
    assert float(torch.stack(theirs).std(0).mean()) > 0.01  # they differ, so that mixing them up would show
    assert float((torch.cat(ours) - torch.cat(theirs)).abs().max()) < tolerance


def test_one_prompt_at_a_time_and_all_in_one_step(case: Case) -> None:
    engine = case.engine()
    for kind, params in KINDS.items():
        close([engine.ask([prompt], params)[0] for prompt in prompts()], case.truth[kind])
        close(engine.ask(prompts(), params), case.truth[kind])
        assert [len(step.rows) for step in engine.steps] == [len(prompts())]


def test_behind_a_cached_prefix(case: Case) -> None:
    engine = case.engine(use_dynamic_prompt_cache=True)
    for kind, params in KINDS.items():
        engine.ask(prompts()[:1], params)
        close(engine.ask(prompts(), params), case.truth[kind])
        # A last hidden state needs nothing of what is cached, a mean or a first one all.
        assert max(row.start for step in engine.steps for row in step.rows) == (60 if kind == "last" else 0)


def test_in_blocks(case: Case) -> None:
    engine = case.engine(splitfuse_mode=True, splitfuse_block_size=16)
    engine.scheduler.limits = engine.scheduler.limits._replace(batch_max_tokens=16)
    for kind, params in KINDS.items():
        close(engine.ask(prompts(), params), case.truth[kind])
        assert max(step.fed for step in engine.steps) == 16


def test_replayed_on_another_engine(case: Case) -> None:
    engine = case.engine()
    for kind, params in KINDS.items():
        close(engine.ask(prompts(), params, replay=True), case.truth[kind])
    close(engine.ask(prompts(), KINDS["mean"], replay=True, suspect=1), case.truth["mean"])


def test_beside_rows_that_decode(tmp_path: Path) -> None:
    """Blocks of prompts in the steps of a stream, whose tokens stay what they are."""
    case = Case(tmp_path, "qwen3")
    engine = case.engine(splitfuse_mode=True, splitfuse_block_size=16, router_max_wait_tokens=1)
    prompt, params = prompts()[4], SamplingParams(max_new_tokens=60, ignore_eos=True)

    def tokens(*prompts_beside: list[int]) -> list[int]:
        engine.tokens.clear()
        engine.scheduler.submit(Submit(999, 0, 1, 1, prompt, params, [0], [[]]))
        for _ in range(3):
            engine.turn()
        if prompts_beside:
            close(engine.ask(prompts_beside, KINDS["mean"]), case.truth["mean"])
            assert any(step.kind == "mixed" for step in engine.steps)
        while engine.loop.busy:
            engine.turn()
        return list(engine.tokens)

    assert tokens() == tokens(*prompts())


def test_the_runner_of_gpus_has_them_too(tmp_path: Path) -> None:
    """In blocks, once it has run its worst steps."""
    pytest.importorskip("triton")
    case = Case(tmp_path, "qwen3 base")
    plan = embedding_plan(
        case.folder,
        base=case.base,
        device=DEVICE,
        slots=127,
        splitfuse_mode=True,
        splitfuse_block_size=16,
        running_max_req_size=3,
        max_req_total_len=36,
        max_req_input_len=35,
    )
    plan = msgspec.structs.replace(plan, batch_max_tokens=36)
    runner = GpuRunner()
    runner.load(plan, lambda done, total: None)
    runner._shapes = StepShapes(3, [16], [])  # in the interpreter each takes seconds
    runner.prepare(lambda: None)
    engine = Engine(plan, runner)
    engine.scheduler.limits = engine.scheduler.limits._replace(batch_max_tokens=20)
    for kind in ("last", "mean of 24 values, length 1"):
        close(engine.ask(prompts()[2:5], KINDS[kind]), case.truth[kind][2:5], 2e-4)


def test_one_that_slept_and_woke_has_the_same(tmp_path: Path) -> None:
    case = Case(tmp_path, "qwen3")
    engine = case.engine(slots=300)
    before = engine.ask(prompts(), KINDS["mean"])
    engine.loop._runner.stage()
    engine.loop._runner.release(lambda done, total: None)
    engine.loop._runner.restore(lambda done, total: None)
    for ours, theirs in zip(before, engine.ask(prompts(), KINDS["mean"]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("base", [False, True])
def test_modules_of_transformers_have_them_too(base: bool, tmp_path: Path) -> None:
    """`base`: of a checkpoint without head, as e5-mistral is published."""
    folder = write_causal_lm(tmp_path, "mistral")
    if base:
        as_base_model(folder)
    found = outlined(str(folder), trust=False).outline
    assert found is not None
    assert found.generates != base
    plan = embedding_plan(folder)
    plan = msgspec.structs.replace(plan, model=msgspec.structs.replace(plan.model, outline=found, headless=base))
    runner = CpuRunner()
    runner.load(plan, lambda done, total: None)
    engine, truth = Engine(plan, runner), Truth(folder)
    given = [[token % 90 for token in prompt] for prompt in prompts()]
    for params in KINDS.values():
        close(engine.ask(given, params), [truth.vector(prompt, params) for prompt in given])
