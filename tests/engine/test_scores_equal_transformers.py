"""Every head that scores has transformers' vectors, whatever way its prompts take through the engine."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.runners.gpu import GpuRunner
from lightllmd.engine.runners.step_shapes import StepShapes
from scored_models import HEADS, MARKER, Engine, Truth, as_llama, scored_plan, write_scored
from tiny_models import BASE, DEVICE, Driver, load

TOLERANCE = 1e-4


def prompts(count: int = 6) -> list[list[int]]:
    """Of different lengths, with steps in them; the first two have a prefix in common, which has steps too."""
    drawn = random.Random(3)
    made = []
    for length in (61, 47, 1, 2, 33, 90)[:count]:
        prompt = drawn.choices(range(3, 99), k=length)
        for at in (*range(5, length, 11), length - 1):
            prompt[at] = MARKER
        made.append(prompt)
    made[1][:40] = made[0][:40]
    return made


class Case:
    """One head, with transformers' vectors of the prompts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        truth = Truth(folder)
        self.truth = [truth.vectors(prompt) for prompt in prompts()]

    def engine(self, **options: Any) -> Engine:
        plan = scored_plan(self.folder, **options)
        runner = CpuRunner()
        runner.load(plan, lambda done, total: None)
        return Engine(plan, runner)


@pytest.fixture(scope="module", params=HEADS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(write_scored(tmp_path_factory.mktemp("scored"), HEADS[request.param]))


def close(ours: list[list[list[float]]], theirs: list[list[list[float]]], tolerance: float = TOLERANCE) -> None:
    assert [[len(vector) for vector in vectors] for vectors in ours] == [
        [len(vector) for vector in vectors] for vectors in theirs
    ]
    flat = [torch.tensor([value for vectors in of for vector in vectors for value in vector]) for of in (ours, theirs)]
    assert float(flat[1].std()) > 0.05  # they differ, so that mixing them up would show
    assert float((flat[0] - flat[1]).abs().max()) < tolerance


def test_one_prompt_at_a_time(case: Case) -> None:
    engine = case.engine()
    close([engine.ask([prompt])[0] for prompt in prompts()], case.truth)


def test_prompts_of_various_lengths_in_one_step(case: Case) -> None:
    engine = case.engine()
    close(engine.ask(prompts()), case.truth)
    assert [len(step.rows) for step in engine.steps] == [len(prompts())]


def test_behind_a_cached_prefix(case: Case) -> None:
    engine = case.engine(use_dynamic_prompt_cache=True)
    first = engine.ask(prompts()[:1])
    rest = engine.ask(prompts()[1:])
    close(first + rest, case.truth)
    # Steps are read where they are, so that what precedes the first of them is all that the cache can give.
    assert min(row.start for step in engine.steps for row in step.rows if len(row.tokens) > 2) == 0
    assert max(row.start for row in engine.steps[0].rows) == (5 if engine.plan.scoring.marker else 40)


def test_in_blocks(case: Case) -> None:
    engine = case.engine(splitfuse_mode=True, splitfuse_block_size=16)
    engine.scheduler.limits = engine.scheduler.limits._replace(batch_max_tokens=16)
    close(engine.ask(prompts()), case.truth)
    assert max(step.fed for step in engine.steps) == 16


def test_replayed_on_another_engine(case: Case) -> None:
    engine = case.engine()
    close(engine.ask(prompts(), replay=True), case.truth)
    close(engine.ask(prompts(), replay=True, suspect=1), case.truth)


@pytest.mark.parametrize(("head", "prepared"), [("llama, three labels", False), ("qwen2 process reward", True)])
def test_the_runner_of_gpus_has_them_too(head: str, prepared: bool, tmp_path: Path) -> None:
    """In blocks, perhaps once it has run its worst steps."""
    pytest.importorskip("triton")
    folder = write_scored(tmp_path, HEADS[head])
    truth = Truth(folder)
    plan = scored_plan(
        folder,
        device=DEVICE,
        slots=255,
        splitfuse_mode=True,
        splitfuse_block_size=32,
        running_max_req_size=5,
        max_req_total_len=70,
        max_req_input_len=69,
    )
    plan = msgspec.structs.replace(plan, batch_max_tokens=70)
    runner = GpuRunner()
    runner.load(plan, lambda done, total: None)
    runner._shapes = StepShapes(5, [16], [])  # in the interpreter each takes seconds
    if prepared:
        runner.prepare(lambda: None)
    engine = Engine(plan, runner)
    engine.scheduler.limits = engine.scheduler.limits._replace(batch_max_tokens=64)
    asked = prompts(3)
    close(engine.ask(asked), [truth.vectors(prompt) for prompt in asked], 2e-4)


@pytest.mark.parametrize(("kind", "stage"), [(CpuRunner, True), (CpuRunner, False), (GpuRunner, True)])
def test_who_slept_and_woke_has_the_same(kind: type[CpuRunner] | type[GpuRunner], stage: bool, tmp_path: Path) -> None:
    folder = write_scored(tmp_path, HEADS["qwen2 process reward"])
    runner, device = kind(), "cpu" if kind is CpuRunner else DEVICE
    plan = scored_plan(folder, device=device, slots=80, running_max_req_size=3)
    runner.load(plan, lambda done, total: None)
    before = Engine(plan, runner).ask(prompts(2)[1:])
    if stage:
        runner.stage()
    runner.release(lambda done, total: None)
    runner.restore(lambda done, total: None)
    assert Engine(plan, runner).ask(prompts(2)[1:]) == before


def test_internlm2_generates_as_the_llama_that_it_is(tmp_path: Path) -> None:
    """Its queries, keys and values are one tensor, in groups."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    changes = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": True}
    folder = write_scored(tmp_path, changes)
    stored, config = load_file(folder / "model.safetensors"), BASE | changes
    llama = LlamaConfig(**config | {"model_type": "llama", "attention_bias": True}, attn_implementation="eager")
    model = LlamaForCausalLM(llama).eval()
    weights = {f"model.{name}": value for name, value in as_llama(stored, config).items()}
    model.load_state_dict(weights | {"lm_head.weight": stored["output.weight"]}, strict=True)
    driver, ids = Driver(load(folder)), prompts()[0]
    with torch.inference_mode():
        theirs = model(torch.tensor([ids])).logits[0]
    assert float((driver.logits(driver.row(0, ids))[0] - theirs).abs().max()) < TOLERANCE
