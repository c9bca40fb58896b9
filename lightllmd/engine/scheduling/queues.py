"""The queues of sequences that wait for admission.

The first that is not empty is served from its head without overtaking:

* `paused`, oldest first: sequences that ran before, in this generation or in one that died;
* `suspects`, one at a time: they had no token yet when an engine died, so nothing else is out together with the step
  that it could die of. First come those that were there at the fewest deaths, of them the newest;
* `waiting`, in order of arrival within a tenant and fair between tenants, see `FairQueue`: those that never ran. They
  also follow right behind the paused while there is no suspect.
"""

from __future__ import annotations

from bisect import insort

from lightllmd.engine.scheduling.fair_queue import FairQueue
from lightllmd.engine.scheduling.sequence import Sequence, State


def age(sequence: Sequence) -> tuple[int, int, int]:
    """Sorts the oldest first."""
    return sequence.order


def _suspicion(sequence: Sequence) -> tuple[int, tuple[int, int, int]]:
    """Greater runs first."""
    return -sequence.suspect, sequence.order


class Queues:
    """A sequence is in the queue that its state and suspicion say, from `add` to `admit` or `remove`."""

    def __init__(self) -> None:
        self.paused: list[Sequence] = []  # ascending by order; no suspects
        self.suspects: list[Sequence] = []  # the first to run is last
        self.waiting = FairQueue()

    def __len__(self) -> int:
        return len(self.paused) + len(self.suspects) + len(self.waiting)

    @property
    def suspect_is_next(self) -> bool:
        """Suspects come after the paused."""
        return bool(self.suspects) and not self.paused

    def next(self, admitted: list[Sequence]) -> Sequence | None:
        """The sequence that may be admitted together with those that are `admitted` in the same step; of a beam search
        the one that feeds the prompt. None: no further one."""
        if admitted and admitted[0].suspect:
            return None
        if self.paused:
            sequence = self.paused[0]
        elif not self.suspects:
            return self.waiting.head
        elif admitted:
            return None
        else:
            request = self.suspects[-1].request
            sequence = next(sequence for sequence in self.suspects if sequence.request == request)
        return sequence.fork_lead if sequence.beam else sequence

    def add(self, sequence: Sequence) -> None:
        """To its place."""
        if sequence.state is State.WAITING:
            self.waiting.add(sequence)
        elif sequence.suspect:
            insort(self.suspects, sequence, key=_suspicion)
        else:
            insort(self.paused, sequence, key=age)

    def admit(self, sequence: Sequence) -> None:
        """The head is admitted, or one that goes with it."""
        if sequence.state is State.WAITING:
            self.waiting.admit(sequence)
        else:
            self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It leaves without being admitted."""
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        else:
            (self.suspects if sequence.suspect else self.paused).remove(sequence)

    def clear_suspect(self, sequence: Sequence) -> None:
        """It is a normal one again."""
        if sequence.state is State.PAUSED:
            self.remove(sequence)
        sequence.suspect = 0
        if sequence.state is State.PAUSED:
            self.add(sequence)
