"""A step is all that another rank of a tensor-parallel group would get: plain data that survives its serialisation."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from lightllmd.config.parameters import FakeSettings
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.runners.fake import FakeRunner
from lightllmd.engine.scheduling.restriction import Restrictions
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.engine.step import DecodeRows, Masks, Row, SamplingRow, Step
from lightllmd.ipc.messages import SamplingParams, StepOutput, TextStops
from scheduler_samples import limits, submit

PLAIN = (int, float, str, bytes, bool, type(None), list, tuple, dict)
DATA = (Step, DecodeRows, Row, SamplingRow, SamplingParams, TextStops)
REQUESTS = {
    "siblings": (submit(1, 40, 6, params={"n": 3, "do_sample": True, "seed": 7}), {"diverse_mode": True}),
    "beams": (submit(1, 20, 6, params={"n": 2, "stops": TextStops(strings=("x",))}), {"beam_mode": True}),
    "masks": (submit(1, 20, 6, params={"bad_words": [[5, 6]], "logit_bias": {3: 1.5}}), {}),
    "log-probabilities of the prompt": (submit(1, 50, 6, params={"prompt_logprobs": 2, "top_logprobs": 2}), {}),
    "cached prefix": (submit(1, 200, 6, prompt=[7] * 200), {"use_dynamic_prompt_cache": True}),
}


class Rank(FakeRunner):
    """Takes steps as another process would get them."""

    def launch(self, step: Step, beat: Callable[[], None], masks: Callable[[], Masks] | None = None) -> None:
        super().launch(msgspec.msgpack.decode(msgspec.msgpack.encode(step), type=Step), beat, masks)


def reached(step: Step) -> set[type]:
    """The types of all objects that a step refers to."""
    seen: dict[int, Any] = {}
    todo: list[Any] = [step]
    while todo:
        one = todo.pop()
        if id(one) not in seen and not isinstance(one, type):
            seen[id(one)] = one
            todo += gc.get_referents(one)
    return {type(one) for one in seen.values()}


@pytest.mark.parametrize("asked", REQUESTS)
@pytest.mark.parametrize("block", [0, 16], ids=["whole prompts", "blocks"])
def test_a_step_holds_all_that_a_rank_needs_and_nothing_of_the_scheduler(asked: str, block: int) -> None:
    message, modes = REQUESTS[asked]
    told: list[list[StepOutput]] = []
    for made in (FakeRunner, Rank):
        changed = limits(splitfuse_block_size=block, router_max_wait_tokens=0, **modes)
        scheduler = Scheduler(changed, 1, Restrictions(256, changed.eos_ids, None))
        steps: list[Step] = []
        loop = StepLoop(scheduler, made(FakeSettings(overlap=True)), steps.append)
        outputs = []
        for request in (submit(9, 30, 12), message, submit(10, 200, 4, prompt=[7] * 200)):
            assert scheduler.submit(request) is None
            for _ in range(3):
                outputs += loop.turn(lambda: None).values()
        while loop.busy:
            outputs += loop.turn(lambda: None).values()
        told.append(outputs)
        assert {kind for step in steps for kind in reached(step)} <= {*PLAIN, *DATA}
    assert told[0] == told[1]
    assert sum(len(output.tokens) for output in told[0]) >= 12 + 6 + 4
