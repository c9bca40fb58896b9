"""The engine's turn: schedule, launch, collect, complete. All who drive a scheduler and a runner do it here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.engine.scheduling.sequence import Owner
from lightllmd.engine.step import Masks, Runner, Step
from lightllmd.ipc.messages import StepOutput


def _nothing(_: Step) -> None:
    pass


class StepLoop:
    """Launches the next step while the one before it computes, so what a step made is noticed one step late. Where the
    tokens of the step before restrict those of the next, it is completed once the forward of the next is launched, and
    sampling waits for masks that are made while that computes.

    With a runner that does not overlap each step ends before the next is scheduled. Between turns the scheduler may be
    told things (submit, abort, api_gone), whatever is out::

        loop = StepLoop(scheduler, runner)
        while loop.busy:
            for owner, output in loop.turn(beat).items(): ...

    `before` is called with each step right before its launch, when `out` has it already.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, before: Callable[[Step], None] = _nothing) -> None:
        self.out: deque[Step] = deque()  # launched and not collected, oldest first; between turns one at most
        self.completed: Step | None = None  # the step whose outputs the newest turn returned
        self._scheduler = scheduler
        self._runner = runner
        self._before = before

    @property
    def busy(self) -> bool:
        """Turns have something to do: a sequence runs or is in line, or a step is out."""
        return bool(self.out) or self._scheduler.busy

    def turn(self, beat: Callable[[], None], waiting: Callable[[], None] | None = None) -> dict[Owner, StepOutput]:
        """Launches the next step if there is one, then completes the oldest if nothing could be launched or more are
        out than the runner overlaps. Returns what each api worker is to be told; empty when no step was completed.

        `beat` is called as work goes on, `waiting` (unset: `beat`) while the device is waited for. Raises OutOfMemory.
        """
        self.completed = None
        waiting = waiting or beat
        step = self._scheduler.next_step()
        if step is None:
            return self._complete(waiting) if self.out else {}
        self.out.append(step)
        self._before(step)
        outputs: dict[Owner, StepOutput] = {}

        def masks() -> Masks:
            if len(self.out) > 1:
                outputs.update(self._complete(waiting))
            return self._scheduler.late_masks()

        self._runner.launch(step, beat, masks if self._scheduler.masks_late else None)
        if self.completed is not None or len(self.out) <= self._runner.overlaps:
            return outputs
        return self._complete(waiting)

    def _complete(self, waiting: Callable[[], None]) -> dict[Owner, StepOutput]:
        """The oldest step."""
        result = self._runner.collect(waiting)
        self.completed = self.out.popleft()
        return self._scheduler.complete(result)
