"""Models that no family covers have transformers' own logits and streams, whatever their requests go through."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from lightllmd.config.plan import Plan
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.scheduling.admission import SchedulerLimits
from lightllmd.engine.scheduling.constraint import Constraints
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.ipc.messages import SamplingParams, Submit
from lightllmd.models.hf.dry_run import outlined
from tiny_causal_lms import CONFIGS, write_causal_lm
from tiny_models import Driver, plan_for, transformers_model

TOLERANCE = 1e-4
PROMPT, NEW = 21, 7  # tokens


def plan_of(folder: Path, **options: Any) -> Plan:
    """As the probe and resolution make it, without their processes."""
    plan = plan_for(folder, **{"max_req_input_len": 63, "max_req_total_len": 64, **options})
    assert plan.model is not None
    found = outlined(str(folder), trust=False)
    assert found.outline is not None, found.refused
    model = msgspec.structs.replace(plan.model, outline=found.outline)
    return msgspec.structs.replace(plan, model=model)


def load(plan: Plan) -> CpuRunner:
    runner = CpuRunner()
    runner.load(plan, lambda done, total: None)
    return runner


class Case:
    """One model: the plan and transformers' logits of a sequence."""

    def __init__(self, folder: Path) -> None:
        self.plan = plan_of(folder)
        self.runner = load(self.plan)
        self.model = transformers_model(folder)
        self.ids = random.Random(1).choices(range(3, 96), k=PROMPT + NEW)

    @torch.inference_mode()
    def truth(self, ids: list[int]) -> Tensor:
        """``[T, vocab]``."""
        logits: Tensor = self.model(torch.tensor([ids])).logits[0]
        return logits

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.truth(ids)[-1].argmax()))
        return ids[len(prompt) :]


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(write_causal_lm(tmp_path_factory.mktemp("causal"), request.param))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert torch.isfinite(ours).all()
    difference = (ours - theirs).abs().max().item()
    assert difference < TOLERANCE, difference


def test_logits_are_those_of_transformers_in_any_batch_and_behind_a_cached_prefix(case: Case) -> None:
    driver = Driver(case.runner, scattered=True, poisoned=True)
    truth = case.truth(case.ids)
    others = [driver.row(7, case.ids[3:9]), driver.row(8, case.ids[5:6])]
    first = driver.logits(*others, driver.row(0, case.ids[:13], sample=False, prompt_length=PROMPT))[2]
    close(first, truth[:13])
    rest = driver.logits(driver.row(7, [4], 1), driver.row(0, case.ids[13:PROMPT]), driver.row(8, [9], 1))[1]
    close(rest, truth[13:PROMPT])
    for index, token in enumerate(case.ids[PROMPT:]):
        close(
            driver.logits(driver.row(0, [token], index + 1), driver.row(7, [5], 2 + index))[0],
            truth[PROMPT + index][None],
        )


class Engine:
    """Scheduler and runner of one generation."""

    def __init__(self, case: Case, number: int, runner: CpuRunner) -> None:
        plan = case.plan
        self.scheduler = Scheduler(SchedulerLimits.of(plan), number, Constraints(plan.vocab_size, [], None))
        self.loop = StepLoop(self.scheduler, runner, lambda step: None)
        self.told: dict[int, list[int]] = {}

    def submit(self, number: int, prompt: list[int], emitted: list[int]) -> None:
        params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
        self.told[number] = []
        message = Submit(number, 0, 1, number, prompt, params, branches=[0], emitted=[emitted])
        assert self.scheduler.submit(message) is None

    def turn(self) -> None:
        for output in self.loop.turn(lambda: None).values():
            for request, token in zip(output.requests, output.tokens, strict=True):
                self.told[request].append(token)


def test_greedy_streams_are_theirs_through_a_kill_and_replay(case: Case) -> None:
    prompts = {1: case.ids[:PROMPT], 2: case.ids[4:11]}
    engine = Engine(case, 1, case.runner)
    for number, prompt in prompts.items():
        engine.submit(number, prompt, [])
    while min(map(len, engine.told.values())) < 3:
        engine.turn()
    emitted = engine.told
    engine = Engine(case, 2, load(case.plan))
    for number, prompt in prompts.items():
        engine.submit(number, prompt, emitted[number])
    while engine.loop.busy:
        engine.turn()
    for number, prompt in prompts.items():
        assert emitted[number] + engine.told[number] == case.greedy(prompt, NEW)
