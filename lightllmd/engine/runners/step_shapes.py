"""What steps look like to the kernels of a GPU. Launches cost the host more than small steps cost the device, so these
are padded to a few shapes, each of which can be captured as a CUDA graph."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from lightllmd.config.bounds import NAMED_ROWS, batch_sizes
from lightllmd.engine.step import Step


class Shape(NamedTuple):
    """How many tokens: first those of rows that feed one each, then those of longer rows. The former are read as decode
    rows are, whoever named them; where there are none, the latter may be single ones too."""

    ahead: int
    behind: int
    padded: bool = True  # a step may have fewer of both

    @property
    def tokens(self) -> int:
        return self.ahead + self.behind

    @property
    def rows_behind(self) -> int:
        """Of a padded shape. The last of them is always padding."""
        return min(self.behind, NAMED_ROWS) + 1 if self.behind else 0


class Shapes:
    def __init__(self, rows: int, prefill: list[int], mixed: list[tuple[int, int]]) -> None:
        """`rows`: the most that a step has. `prefill`: tokens of short prefills. `mixed`: rows that go on, and tokens
        of prompts beside them. Both are ascending, and empty where such steps are not padded."""
        self._sizes, self._prefill = batch_sizes(rows), prefill
        self._mixed = [Shape(ahead, behind) for ahead, behind in mixed]

    def __iter__(self) -> Iterator[Shape]:
        """All padded ones, those with the most tokens first."""
        decode = [Shape(size, 0) for size in self._sizes]
        prefill = [Shape(0, size) for size in self._prefill]
        return iter(sorted(decode + prefill + self._mixed, key=lambda shape: -shape.tokens))

    def rows(self, count: int) -> int:
        """The batch size that so many rows are padded to."""
        return self._sizes[bisect_left(self._sizes, count)]

    def of(self, step: Step) -> Shape:
        ahead, fed = len(step.decode.table_rows), [len(row.tokens) for row in step.rows if row.tokens]
        single = ahead + fed.count(1)
        behind = ahead + sum(fed) - single
        if not behind:
            return Shape(self.rows(single), 0)
        if not ahead and len(fed) <= NAMED_ROWS and (size := _least(self._prefill, sum(fed))):
            return Shape(0, size)
        longer = ahead + len(fed) - single
        if longer <= NAMED_ROWS:
            index = bisect_left(self._mixed, (single,))
            if index < len(self._mixed) and behind <= self._mixed[index].behind:
                return self._mixed[index]
        return Shape(single, behind, padded=False)


def _least(sizes: list[int], number: int) -> int | None:
    """The least of them that holds it."""
    index = bisect_left(sizes, number)
    return sizes[index] if index < len(sizes) else None


def places(step: Step, shape: Shape) -> list[int]:
    """Where the first token of each of `Step.rows` lies among the packed ones; of a twin, that of the row it is a twin
    of, whose tokens it takes for its own."""
    found: list[int] = []
    ahead, behind = len(step.decode.table_rows), shape.ahead
    for row in step.rows:
        if row.twin_of is not None:
            found.append(found[row.twin_of])
        elif shape.ahead and len(row.tokens) == 1:
            found.append(ahead)
            ahead += 1
        else:
            found.append(behind)
            behind += len(row.tokens)
    return found
