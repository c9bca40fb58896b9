"""Limits and requests for tests of the scheduler."""

from __future__ import annotations

from lightllmd.config.parameters import FakeSettings
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.runners.fake import FakeRunner
from lightllmd.engine.scheduling.admission import SchedulerLimits
from lightllmd.engine.scheduling.restriction import Restrictions
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.engine.step import Step
from lightllmd.ipc.messages import SamplingParams, StepOutput, Submit

DEFAULTS = {
    "max_total_token_num": 1000,
    "batch_max_tokens": 600,
    "running_max_req_size": 100,
    "router_token_ratio": 0.0,
    "router_max_new_token_len": 64,
    "router_max_wait_tokens": 10,
    "eos_ids": frozenset([256]),
    "max_queue": 100,
}


def limits(**changes: object) -> SchedulerLimits:
    return SchedulerLimits(**(DEFAULTS | changes))


def submit(request: int, length: int = 10, most: int = 20, **fields: object) -> Submit:
    """A request of api worker 0, epoch 1, whose prompt is its number over and over, unless `prompt` is given."""
    prompt = fields.pop("prompt", [request % 256] * length)
    params = SamplingParams(max_new_tokens=most, **fields.pop("params", {}))
    values = {"branches": list(range(params.n)), "emitted": [[] for _ in range(params.n)]} | fields
    return Submit(request, 0, 1, request, prompt, params, **values)


class Steps:
    """A scheduler with the fake runner; the steps in the order of their launches, and what they told."""

    def __init__(self, *messages: Submit, overlap: bool = False, **changes: object) -> None:
        changed = limits(**changes)
        self.scheduler = Scheduler(changed, 1, Restrictions(256, changed.eos_ids, None))
        self._loop = StepLoop(self.scheduler, FakeRunner(FakeSettings(overlap=overlap)), self._launched)
        self.launched: list[Step] = []
        self.told: list[StepOutput] = []
        self.put(*messages)

    def put(self, *messages: Submit) -> None:
        for message in messages:
            assert self.scheduler.submit(message) is None

    def turn(self) -> Step | None:
        """Returns the step that was launched."""
        before = len(self.launched)
        self.told += self._loop.turn(lambda: None).values()
        self.scheduler.check()
        return self.launched[-1] if len(self.launched) > before else None

    def drain(self) -> list[Step]:
        """All steps until nobody is left."""
        before = len(self.launched)
        while self._loop.busy:
            self.turn()
        return self.launched[before:]

    def _launched(self, step: Step) -> None:
        self.launched.append(step)
