"""How the tokens of two texts become one prompt, as a cross encoder reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PairFrame:
    """The special tokens around two texts that are encoded together."""

    before: Sequence[int] = ()
    between: Sequence[int] = ()
    after: Sequence[int] = ()

    @property
    def size(self) -> int:
        """Tokens."""
        return len(self.before) + len(self.between) + len(self.after)

    def join(self, first: Sequence[int], second: Sequence[int]) -> list[int]:
        """The prompt of two texts' tokens."""
        return [*self.before, *first, *self.between, *second, *self.after]


NO_FRAME = PairFrame()


@dataclass(frozen=True)
class PairCut:
    """What is kept of two texts; None: all."""

    first: int | None = None  # tokens of the first text
    second: int | None = None
    both: int | None = None  # tokens of the prompt, the frame's among them; -1: as many as a prompt may have
    from_left: bool = False  # the first tokens of a text are left out, instead of the last ones

    def most(self, own: int | None) -> int | None:
        """Tokens that are kept of a text whose own bound is `own`; None: all."""
        bounds = [bound for bound in (own, self.both) if bound is not None]
        return min(bounds) if bounds else None

    def kept(self, ids: Sequence[int], most: int | None) -> Sequence[int]:
        """`most` tokens of a text; None: all of them."""
        if most is None or len(ids) <= most:
            return ids
        return ids[len(ids) - most :] if self.from_left else ids[:most]

    def apply(self, first: Sequence[int], second: Sequence[int], frame: int) -> tuple[Sequence[int], Sequence[int]]:
        """Both texts' tokens, cut. `frame`: tokens around them. Of a prompt that is too long the longer text is cut
        until both have the same length, then both are: transformers' strategy "longest_first"."""
        first, second = self.kept(first, self.first), self.kept(second, self.second)
        if self.both is None:
            return first, second
        room = max(0, self.both - frame)
        if len(first) + len(second) <= room:
            return first, second
        shorter = min(len(first), len(second))
        longer = max(shorter, room - shorter)
        if shorter + longer > room:
            shorter, longer = room // 2, room - room // 2
        kept = (longer, shorter) if len(first) > len(second) else (shorter, longer)
        return self.kept(first, kept[0]), self.kept(second, kept[1])


NO_CUT = PairCut()
