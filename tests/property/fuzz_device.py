"""A device that knows what each slot holds: the token that was written there and all tokens before it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from lightllmd.config.parameters import FakeSettings
from lightllmd.engine.runners.fake import FakeRunner
from lightllmd.engine.step import Masks, Row, Step, StepResult

Branch = tuple[int, int]  # (request, its branch)
NOTHING = 0  # the key of no tokens, and of a slot that was never written


def prefix_keys(tokens: list[int], before: int = NOTHING) -> list[int]:
    """A key of each beginning of `tokens`, behind what `before` is the key of."""
    keys = []
    for token in tokens:
        before = hash((before, token))
        keys.append(before)
    return keys


@dataclass
class Resident:
    """Who has a table row, and the row's entries of the request->slot table."""

    owner: Branch
    cached: bool  # it may use the prompt cache
    keys: list[int]  # of the beginnings of its tokens, as far as the scheduler named them or this device drew them
    slots: list[int]


class Device(FakeRunner):
    """Runs what was launched in that order, as late as it may.

    Each row that computes must find in the slots of its past exactly the tokens before it, computed by steps before
    this one, and in all of its slots exactly its own tokens when the step's writes are done. So it notices a past that
    is not computed yet, a slot that changed hands too early, and the past of somebody else.
    """

    def __init__(self, slots: int, depth: int, seen: Counter[str]) -> None:
        super().__init__(FakeSettings())
        self.overlaps = depth  # steps that stay out while the next is scheduled
        self._launched: deque[tuple[Step, Masks]] = deque()
        self._holds = [NOTHING] * slots
        self._writers: list[tuple[int, bool]] = [(0, True)] * slots  # (request, it may use the prompt cache)
        self._residents: dict[int, Resident] = {}  # by table row
        self._seen = seen

    def launch(self, step: Step, beat: Callable[[], None], masks: Callable[[], Masks] | None = None) -> None:
        self._launched.append((step, {} if masks is None else masks()))

    def collect(self, beat: Callable[[], None]) -> StepResult:
        step, late = self._launched.popleft()
        for table_row in step.freed:
            del self._residents[table_row]
        computing, writes = [], []
        decode = step.decode
        for table_row, start, slot in zip(decode.table_rows, decode.starts, decode.slots, strict=True):
            resident = self._residents[table_row]
            assert start == len(resident.slots) == len(resident.keys)
            computing.append(resident)
            writes += self._feed(resident, start, [self._branches[table_row].newest], [slot])
        for row in step.rows:
            resident = self._resident(row, computing[len(decode.table_rows) :])
            computing.append(resident)
            writes += self._feed(resident, row.start, row.tokens, row.slots)
        assert len({slot for slot, _, _ in writes}) == len(writes), "two rows of a step write to one slot"
        self._seen["duplicates"] += len(writes) - len({key for _, key, _ in writes})
        for slot, key, resident in writes:
            self._holds[slot], self._writers[slot] = key, (resident.owner[0], resident.cached)
        for resident in computing:
            self._reads(resident, len(resident.slots))
        super().launch(step, beat, lambda: late)
        return super().collect(beat)

    def _resident(self, row: Row, before: list[Resident]) -> Resident:
        """Of a row; `before` are those of the step's rows before it."""
        known = self._residents.get(row.table_row)
        if row.sampling is None:
            assert known is not None
            assert known.owner == (row.request, row.branch)
            assert row.past is None
            return known
        sampling = row.sampling
        assert known is None or known.owner == (row.request, row.branch), "a table row has one owner"
        past = row.past or []
        assert len(past) == row.start
        keys = prefix_keys(sampling.prompt_ids + sampling.emitted)
        cached = sampling.params.use_cache
        resident = self._residents[row.table_row] = Resident((row.request, row.branch), cached, keys, list(past))
        if row.sibling_of is not None:
            lead = before[row.sibling_of]
            assert lead.owner[0] == row.request
            assert not row.tokens
            assert past == lead.slots, "a twin has the past of the row that it is a twin of"
            return resident
        for slot in past:
            request, open_to_all = self._writers[slot]
            assert request == row.request or (open_to_all and cached), "who opts out reads nothing and leaves nothing"
        return resident

    def _feed(
        self, resident: Resident, start: int, tokens: list[int], slots: list[int]
    ) -> list[tuple[int, int, Resident]]:
        """Which slots get what; they join the row's."""
        assert len(tokens) == len(slots)
        assert start == len(resident.slots)
        keys = prefix_keys(tokens, resident.keys[start - 1] if start else NOTHING)
        known = resident.keys[start : start + len(keys)]
        assert keys[: len(known)] == known, "other tokens are fed than the row entered with"
        resident.keys += keys[len(known) :]
        if tokens:
            self._reads(resident, start)
        resident.slots += slots
        return [(slot, key, resident) for slot, key in zip(slots, keys, strict=True)]

    def _reads(self, resident: Resident, count: int) -> None:
        found = [self._holds[slot] for slot in resident.slots[:count]]
        if found != resident.keys[:count]:
            at = next(at for at in range(count) if found[at] != resident.keys[at])
            raise AssertionError(f"{resident.owner}: token {at} of its past is not in slot {resident.slots[at]}")
