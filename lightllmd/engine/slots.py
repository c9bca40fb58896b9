"""The allocator of token slots: which slot of the KV cache belongs to somebody.

A slot holds one token's keys and values in every layer; any slot is as good as any other for correctness, so there
is no fragmentation. On a CPU attention reads faster where a sequence's slots are contiguous, so a sequence is placed
in a gap with room to grow where there is one, and grows into the slot after its last.
"""

from __future__ import annotations


class Slots:
    """`total` slots, numbered from 0. One byte per slot says whether it has an owner; `free` counts those without."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._owned = bytearray(total)
        self._hint = 0  # no slot below this one is free
        self._cursor = 0  # behind the room of the sequence that was placed last, where the search for a gap begins

    @property
    def used(self) -> int:
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
            start = self._owned.find(bytes(gap), begin)
            if start >= 0:
                self._cursor = start + gap
                break
        self.free -= count
        if start < 0:
            return self._lowest(count)
        self._owned[start : start + count] = b"\1" * count
        return list(range(start, start + count))

    def grow(self, held: list[list[int]]) -> list[int]:
        """Appends one slot to each sequence's: the one behind its last, else the lowest free one. Returns the new ones.

        Raises RuntimeError when fewer are free.
        """
        if len(held) > self.free:
            raise RuntimeError(f"{len(held)} slots asked, {self.free} of {self.total} free")
        owned, total = self._owned, self.total
        taken = []
        for slots in held:  # once per token served
            slot = slots[-1] + 1
            if slot >= total or owned[slot]:
                slot = self._hint = owned.find(0, self._hint)
            owned[slot] = 1
            slots.append(slot)
            taken.append(slot)
        self.free -= len(taken)
        return taken

    def release(self, slots: list[int]) -> None:
        """Gives slots back. Raises RuntimeError for one that has no owner: it would get two."""
        owned = self._owned
        for slot in slots:
            if not owned[slot]:
                raise RuntimeError(f"slot {slot} was released twice")
            owned[slot] = 0
        self.free += len(slots)
        self._hint = min(self._hint, min(slots, default=self.total))

    def check(self) -> None:
        """Raises RuntimeError unless free + used == total by an actual count."""
        if self._owned.count(0) != self.free:
            raise RuntimeError(f"{self.free} slots are counted free, {self._owned.count(0)} are")

    def _lowest(self, count: int) -> list[int]:
        taken: list[int] = []
        slot = self._hint - 1
        for _ in range(count):
            slot = self._owned.find(0, slot + 1)
            self._owned[slot] = 1
            taken.append(slot)
        self._hint = slot + 1
        return taken
