"""What steps look like to the kernels of a GPU. Launches cost the host more than small steps cost the device, so these
are padded to a few shapes, each of which can be captured as a CUDA graph."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from lightllmd.config.bounds import PREFILL_ROWS, batch_sizes
from lightllmd.engine.step import Step


class StepShape(NamedTuple):
    """How many tokens: first those of rows that feed one each, which decode attention reads, then those of longer rows,
    which prefill attention reads. Either part may hold single tokens, named by the scheduler or not."""

    decode_tokens: int
    prefill_tokens: int
    padded: bool = True  # a step may have fewer of both

    @property
    def tokens(self) -> int:
        """Padding included."""
        return self.decode_tokens + self.prefill_tokens

    @property
    def prefill_rows(self) -> int:
        """Rows of the second part of a padded shape. The last of them is always padding."""
        return min(self.prefill_tokens, PREFILL_ROWS) + 1 if self.prefill_tokens else 0


class StepShapes:
    """The padded shapes, and which of them a step gets."""

    def __init__(self, rows: int, prefill: list[int], mixed: list[tuple[int, int]]) -> None:
        """`rows`: the most that a step has. `prefill`: tokens of short prefills. `mixed`: decode rows, and tokens of
        prompts beside them. Both are ascending, and empty where such steps are not padded."""
        self._sizes, self._prefill = batch_sizes(rows), prefill
        self._mixed = [StepShape(decode, prompt) for decode, prompt in mixed]

    def __iter__(self) -> Iterator[StepShape]:
        """All padded ones, those with the most tokens first."""
        decode = [StepShape(size, 0) for size in self._sizes]
        prefill = [StepShape(0, size) for size in self._prefill]
        return iter(sorted(decode + prefill + self._mixed, key=lambda shape: -shape.tokens))

    def rows(self, count: int) -> int:
        """The batch size that so many rows are padded to."""
        return self._sizes[bisect_left(self._sizes, count)]

    def of(self, step: Step) -> StepShape:
        """Of all rows with one token as many as there is room for are read by decode attention."""
        decode, counts = len(step.decode.table_rows), [len(row.tokens) for row in step.rows if row.tokens]
        single, tokens = counts.count(1), sum(counts)
        if tokens == single:
            return StepShape(self.rows(decode + single), 0)
        if not decode and len(counts) <= PREFILL_ROWS and (size := _least(self._prefill, tokens)):
            return StepShape(0, size)
        fewest, most = (bisect_left(self._mixed, (count,)) for count in (decode, decode + single))
        for shape in reversed(self._mixed[fewest : most + 1]):
            moved = min(single, shape.decode_tokens - decode)
            if tokens - moved <= shape.prefill_tokens and len(counts) - moved <= PREFILL_ROWS:
                return shape
        return StepShape(decode + single, tokens - single, padded=False)


def _least(sizes: list[int], number: int) -> int | None:
    """The least of them that holds it."""
    index = bisect_left(sizes, number)
    return sizes[index] if index < len(sizes) else None


def first_tokens(step: Step, shape: StepShape) -> list[int]:
    """Where the first token of each of `Step.rows` lies among the packed ones; of a sibling, that of the row whose
    logits it shares."""
    found: list[int] = []
    single, longer = len(step.decode.table_rows), shape.decode_tokens
    for row in step.rows:
        if row.sibling_of is not None:
            found.append(found[row.sibling_of])
        elif len(row.tokens) == 1 and single < shape.decode_tokens:
            found.append(single)
            single += 1
        else:
            found.append(longer)
            longer += len(row.tokens)
    return found
