"""What every runner does, whatever computes: the order of a step, and how weights leave the device and come back.

No torch: the fake runner is one too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, Protocol, TypeVar

from lightllmd.config.plan import Plan
from lightllmd.engine.ranks.member import SOLE, Member
from lightllmd.engine.step import Masks, Row, SamplingRow, Step, StepResult

Beat = Callable[[], None]  # called as work goes on, which keeps heartbeats going
Progress = Callable[[int, int], None]  # (done, total) in bytes, several times a second

Packed = TypeVar("Packed")  # a step as the device reads it
Hidden = TypeVar("Hidden")  # what the forward leaves for sampling
Staged = TypeVar("Staged", bound="StagedWeights")  # weights in host memory


class PendingResult(Protocol):
    """A step's results on their way to the host."""

    def wait(self, beat: Beat) -> StepResult:
        """Until they have come. Raises OutOfMemory."""


class ReadyResult:
    """`PendingResult` results that are here already."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def wait(self, beat: Beat) -> StepResult:
        """They are here."""
        return self._result


class StagedWeights(Protocol):
    """Weights that were copied to host memory, or are on their way there."""

    done: int  # bytes
    total: int  # bytes

    @property
    def whole(self) -> bool:
        """All of them are there."""

    @property
    def refused(self) -> bool:
        """Host memory can't hold them."""

    def wait(self, progress: Progress) -> bool:
        """Until they are `whole`, or False: refused."""

    def cancel(self) -> None:
        """Copying ends soon; returns when it has."""


class KeptWeights:
    """`StagedWeights` that stay where they are, because that is host memory."""

    whole, refused = True, False

    def __init__(self, total: int) -> None:
        self.done = self.total = total

    def wait(self, progress: Progress) -> bool:
        """They are there."""
        return True

    def cancel(self) -> None:
        """Nothing goes on."""


class BaseRunner(ABC, Generic[Packed, Hidden, Staged]):
    """A `Runner` but for what its device does in its own way: the methods without a body here.

    Nothing is read before `load` has set it. All calls come from one thread.
    """

    overlaps: bool
    _plan: Plan
    _pending: deque[PendingResult]  # of the steps that are out, oldest first
    _staged: Staged | None  # since `stage`

    def __init__(self, member: Member = SOLE) -> None:
        """`member`: of which group it is; of a rank other than 0 what its steps make is not asked for."""
        self._member = member

    # --- life ---------------------------------------------------------------------------------------------------------
    def load(self, plan: Plan, progress: Progress) -> None:
        """See `Runner.load`."""
        self._plan, self._pending, self._staged = plan, deque(), None
        self._open()
        with self._computing():
            self._load_weights(progress)
            self._allocate()

    @abstractmethod
    def prepare(self, beat: Beat) -> None:
        """See `Runner.prepare`."""

    def stage(self) -> None:
        """See `Runner.stage`."""
        if self._staged is None or self._staged.refused:
            self._staged = self._stage_weights()

    def unstage(self) -> None:
        """See `Runner.unstage`."""
        if self._staged is not None:
            self._staged.cancel()
            self._staged = None

    def release(self, progress: Progress) -> None:
        """See `Runner.release`."""
        whole = self._staged is not None and self._staged.wait(progress)
        self._pending.clear()
        with self._computing():
            self._free(weights_stay=whole)

    def restore(self, progress: Progress) -> None:
        """See `Runner.restore`."""
        with self._computing():
            if self._staged is not None and self._staged.whole:
                self._restore_weights(self._staged, progress)
            else:
                self._load_weights(progress)
            self._allocate()
        self._staged = None

    def memory_stats(self) -> dict[str, float]:
        """See `Runner.memory_stats`."""
        stats = self._memory()
        if self._staged is not None:
            stats["staged_bytes"] = -1.0 if self._staged.refused else float(self._staged.done)
            stats["staged_total"] = float(self._staged.total)
        return stats

    # --- steps --------------------------------------------------------------------------------------------------------
    def launch(self, step: Step, beat: Beat, masks: Callable[[], Masks] | None = None) -> None:
        """See `Runner.launch`. A row whose logits are not numbers gets a log-probability that is none either."""
        with self._computing():
            packed = self._pack(step)
            hidden = self._forward(packed, beat)
            # On a GPU the forward computes meanwhile.
            for row in step.rows:
                if row.sampling is not None:
                    self._enter(row, row.sampling)
            self._restrict(step.masks)
            if masks is not None:
                self._restrict(masks())
            self._pending.append(self._sample(step, packed, hidden, beat))

    def collect(self, beat: Beat) -> StepResult:
        """See `Runner.collect`."""
        with self._computing():
            return self._pending.popleft().wait(beat)

    def run(self, step: Step, beat: Beat) -> StepResult:
        """One step, launched and waited for."""
        self.launch(step, beat)
        return self.collect(beat)

    # --- what a device does in its own way ----------------------------------------------------------------------------
    def _computing(self) -> AbstractContextManager[object]:
        """Around all that computes: turns the device's errors into ours."""
        return nullcontext()

    @abstractmethod
    def _open(self) -> None:
        """Before anything is loaded. Raises NoUsableDevice."""

    @abstractmethod
    def _load_weights(self, progress: Progress) -> None:
        """From the plan's checkpoint."""

    @abstractmethod
    def _allocate(self) -> None:
        """All that steps need beside the weights: KV cache, request->slot table, sampling state."""

    @abstractmethod
    def _stage_weights(self) -> Staged:
        """Begins to copy the weights to host memory, beside the steps."""

    @abstractmethod
    def _free(self, weights_stay: bool) -> None:
        """Undoes `_allocate`, and takes the weights off the device. `weights_stay`: they are staged."""

    @abstractmethod
    def _restore_weights(self, staged: Staged, progress: Progress) -> None:
        """What is staged back to where it was."""

    @abstractmethod
    def _memory(self) -> dict[str, float]:
        """The gauges of `memory_stats` but for what is staged."""

    @abstractmethod
    def _pack(self, step: Step) -> Packed:
        """Lays the step out, and releases the rows that it says are freed."""

    @abstractmethod
    def _forward(self, packed: Packed, beat: Beat) -> Hidden:
        """Through all layers."""

    @abstractmethod
    def _enter(self, row: Row, sampling: SamplingRow) -> None:
        """Sets a row's sampling state."""

    @abstractmethod
    def _restrict(self, masks: Masks) -> None:
        """Sets the masks of table rows."""

    @abstractmethod
    def _sample(self, step: Step, packed: Packed, hidden: Hidden, beat: Beat) -> PendingResult:
        """Draws the next tokens, and computes what is told beside them."""
