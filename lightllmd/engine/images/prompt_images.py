"""The images of one request's prompt with their embeddings, which all its sequences share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightllmd.engine.step import ImagePart
from lightllmd.ipc.messages import ImageSpan

Positions = NDArray[np.int32]  # [3, tokens]: frame, row and column


@dataclass(eq=False, weakref_slot=True, slots=True)
class ImageEmbedding:
    """What one image is to the decoder. Who has a reference to it has the memory, whatever becomes of the visual
    worker."""

    layers: int
    tokens: int
    values: memoryview  # of bytes: [layers, tokens, hidden] numbers of the plan's data type


class PromptImages:
    """Spans of a prompt, each with its embedding. Never changes."""

    def __init__(
        self,
        spans: Sequence[ImageSpan],
        embeddings: Sequence[ImageEmbedding],
        *,
        whole: bool = False,
        positions: Positions | None = None,
    ) -> None:
        """`whole`: tokens of a span see each other in both directions, so a span is fed in one step. `positions`: of
        the prompt's tokens where rotary positions are in the grids of images; the first token behind them follows the
        greatest."""
        self.spans, self._embeddings, self.whole = spans, embeddings, whole
        self._positions = positions
        # What is added to the index of a token behind the prompt to have its rotary position.
        self.shift = 0 if positions is None else int(positions.max()) + 1 - positions.shape[1]

    def parts(self, first: int, end: int) -> list[ImagePart] | None:
        """Of the tokens `first` to `end` those of images, as `Row.images`."""
        found = []
        for span, embedding in zip(self.spans, self._embeddings, strict=True):
            begin, stop = max(first, span.start), min(end, span.start + span.tokens)
            if begin < stop:
                values = _cut(embedding, begin - span.start, stop - span.start)
                found.append(ImagePart(begin - first, stop - begin, values, embedding.layers))
        return found or None

    def positions(self, first: int, end: int) -> bytes | None:
        """Of these tokens, as `Row.positions`; those behind the prompt have one position each."""
        known = self._positions
        if known is None or first >= known.shape[1]:
            return None
        behind = np.arange(known.shape[1], max(end, known.shape[1]), dtype=np.int32) + self.shift
        part = np.concatenate([known[:, first:end], np.broadcast_to(behind, (3, len(behind)))], 1)
        if (part == np.arange(first + self.shift, end + self.shift)).all():
            return None
        return part.astype("<i4").tobytes()

    def uncut(self, end: int) -> int:
        """The last place at or before `end` at which a prompt may be parted: no span that is fed whole lies across."""
        span = self._across(end)
        return end if span is None else span.start

    def end_of_part(self, first: int, end: int) -> int:
        """Where a part from `first` on may end that is to end at `end`: before the span that it would cut, unless it
        begins with that, then behind it."""
        span = self._across(end)
        if span is None:
            return end
        return span.start if span.start > first else span.start + span.tokens

    def _across(self, place: int) -> ImageSpan | None:
        """The span that is fed whole and has tokens on both sides."""
        if not self.whole:
            return None
        return next((span for span in self.spans if span.start < place < span.start + span.tokens), None)


def _cut(embedding: ImageEmbedding, first: int, end: int) -> memoryview:
    """Its tokens `first` to `end`: a view where they lie together, else a copy."""
    size = len(embedding.values) // (embedding.layers * embedding.tokens)
    if embedding.layers == 1 or (first, end) == (0, embedding.tokens):
        return embedding.values[first * size : end * size] if embedding.layers == 1 else embedding.values
    rows = np.frombuffer(embedding.values, np.uint8).reshape(embedding.layers, embedding.tokens, size)
    return memoryview(rows[:, first:end].tobytes())


def positions_in_grids(spans: Sequence[ImageSpan], length: int) -> Positions:
    """Of a prompt of so many tokens, as Qwen2-VL has them (Wang et al. 2024, "Qwen2-VL", 2.1): of text all three go on
    together; an image's begin where the text before it ended, with a place in its grid, and what follows it begins
    behind the greatest of those."""
    parts, next_, end = [], 0, 0
    for span in [*spans, None]:
        begin = length if span is None else span.start
        parts.append(np.broadcast_to(np.arange(next_, next_ + begin - end, dtype=np.int32), (3, begin - end)))
        next_ += begin - end
        if span is not None:
            parts.append(np.indices(span.grid, np.int32).reshape(3, -1) + np.int32(next_))
            next_, end = next_ + max(span.grid), span.start + span.tokens
    return np.concatenate(parts, 1)


def fault_of(spans: Sequence[ImageSpan], prompt: int) -> str | None:
    """Why these can't be the images of a prompt of so many tokens."""
    end = 0
    for span in spans:
        if span.tokens < 1 or span.start < end or span.start + span.tokens > prompt:
            return f"an image of {span.tokens} tokens at {span.start} is not in place in a prompt of {prompt} tokens"
        end = span.start + span.tokens
    return None
