"""The allocator of token slots: which slots of the KV cache are in use, and how many references each has.

A slot holds one token's keys and values in every layer; any slot is as good as any other for correctness, so there
is no fragmentation. On a CPU attention reads faster where a sequence's slots are contiguous, so a sequence is placed
in a gap with room to grow where there is one, and grows into the slot after its last.

A slot is free when it has no reference. Each owner gives back its own reference once, whichever took the slot first.
"""

from __future__ import annotations

from collections.abc import Iterable

MOST_REFERENCES = 255  # to one slot: they are counted in a byte


class Slots:
    """`total` slots, numbered from 0. One byte per slot counts its references; `free` counts the slots without."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._references = bytearray(total)
        self._hint = 0  # no slot below this one is free
        self._cursor = 0  # behind the room of the sequence that was placed last, where the search for a gap begins

    @property
    def used(self) -> int:
        """Slots with a reference."""
        return self.total - self.free

    def take(self, count: int, room: int = 0) -> list[int]:
        """`count` slots in ascending order: a run followed by free room for `room - count` more if there is such a
        gap, else a run, else the lowest free ones. Raises RuntimeError when fewer are free."""
        if count > self.free:
            raise RuntimeError(f"{count} slots asked, {self.free} of {self.total} free")
        room = max(room, count)
        if self.free == self.total:
            self._cursor = 0
        for gap, begin in ((room, self._cursor), (room, self._hint), (count, self._hint)):
            start = self._references.find(bytes(gap), begin)
            if start >= 0:
                self._cursor = start + gap
                break
        self.free -= count
        if start < 0:
            return self._lowest(count)
        self._references[start : start + count] = b"\1" * count
        return list(range(start, start + count))

    def grow(self, held: list[list[int]]) -> list[int]:
        """Appends one slot to each sequence's: the one behind its last, else the lowest free one. Returns the new ones.

        Raises RuntimeError when fewer are free.
        """
        if len(held) > self.free:
            raise RuntimeError(f"{len(held)} slots asked, {self.free} of {self.total} free")
        references, total = self._references, self.total
        taken = []
        for slots in held:  # once per token served
            slot = slots[-1] + 1
            if slot >= total or references[slot]:
                slot = self._hint = references.find(0, self._hint)
            references[slot] = 1
            slots.append(slot)
            taken.append(slot)
        self.free -= len(taken)
        return taken

    def share(self, slots: Iterable[int]) -> None:
        """One more reference to each. Raises RuntimeError for a slot that has no owner, or MOST_REFERENCES."""
        references = self._references
        for slot in slots:
            count = references[slot]
            if not 0 < count < MOST_REFERENCES:
                raise RuntimeError(
                    f"slot {slot} with {count} references can't be shared, 1 to {MOST_REFERENCES - 1} can"
                )
            references[slot] = count + 1

    def release(self, slots: list[int]) -> None:
        """Gives back one reference to each. Raises RuntimeError for a slot that has no owner: it would get two."""
        references = self._references
        freed = len(slots)
        for slot in slots:
            count = references[slot]
            if count == 1:
                references[slot] = 0
            elif count:
                references[slot] = count - 1
                freed -= 1
            else:
                raise RuntimeError(f"slot {slot} was released more often than taken")
        if freed:
            self.free += freed
            self._hint = min(self._hint, min(slots))  # a lower hint than needed does no harm

    @property
    def counts(self) -> bytes:
        """The references to each slot."""
        return bytes(self._references)

    def references(self, slot: int) -> int:
        """How many owners a slot has; 0: it is free."""
        return self._references[slot]

    def check(self) -> None:
        """Raises RuntimeError unless free + used == total by an actual count, and the search for a free slot begins
        before the first."""
        if self._references.count(0) != self.free:
            raise RuntimeError(f"{self.free} slots are counted free, {self._references.count(0)} are")
        first = self._references.find(0)
        if 0 <= first < self._hint:
            raise RuntimeError(f"slot {first} is free, the search for one begins at {self._hint}")

    def _lowest(self, count: int) -> list[int]:
        taken: list[int] = []
        slot = self._hint - 1
        for _ in range(count):
            slot = self._references.find(0, slot + 1)
            self._references[slot] = 1
            taken.append(slot)
        self._hint = slot + 1
        return taken
