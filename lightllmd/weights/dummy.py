"""Random weights of an architecture, made where they stay: for measuring without a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightllmd.architecture.weights import Part, TensorCut, WeightSpec
from lightllmd.weights.loaded import LoadedWeight, Progress, Rooms, room

MATRIX_STD, VECTOR_STD = 0.02, 0.01  # usual initialisation; norms and biases move a little, so that they matter
CHUNK_ELEMENTS = 8 << 20  # drawn at a time: a CPU takes a tenth of a second for them


def stream(
    weights: Sequence[WeightSpec],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    passing: Sequence[WeightSpec] = (),
) -> Iterator[LoadedWeight]:
    """Yields `weights` in their order, as `place.stream` does.

    Matrices are normal around 0, norms around what leaves their input as it is, biases around 0. Each part has its own
    seed, its number among all of them: every start on the same kind of device gives the same numbers, and so does a
    part that is made alone.
    """
    seeds: dict[str, int] = {}
    for weight in weights:
        for part in (weight.whole or weight).stored:
            seeds[part.name] = len(seeds)
    total = sum(_drawn(part) for weight in weights for part in weight.stored) * dtype.itemsize
    generator = torch.Generator(device)
    done = 0

    rooms = Rooms(dtype, device, passing)

    def fill(out: Tensor, parts: tuple[Part, ...], mean: float) -> Tensor:
        nonlocal done
        row = 0
        for part in parts:
            generator.manual_seed(seeds[part.name])
            rows = out[row : row + part.shape[0]]
            for chunk, kept in _chunks(part, rows):
                if len(part.shape) > 1:
                    chunk.normal_(0.0, MATRIX_STD, generator=generator)
                else:
                    chunk.normal_(mean, VECTOR_STD, generator=generator)
                for source, target in kept:
                    target.copy_(source)
                done += chunk.numel() * dtype.itemsize
                progress(done, total)
            row += part.shape[0]
        return out

    for weight in weights:
        tensor = fill(rooms.of(weight), weight.parts, weight.neutral)
        bias = fill(room(weight.bias, dtype, device), weight.bias, 0.0) if weight.bias else None
        yield LoadedWeight(weight, tensor, bias)
        del tensor, bias  # nothing is kept while the next is made


def _drawn(part: Part) -> int:
    """Numbers that are drawn for it: of a rank's part those of the whole."""
    return part.elements if part.cut is None else math.prod(part.cut.shape)


def _chunks(part: Part, out: Tensor) -> Iterator[tuple[Tensor, list[tuple[Tensor, Tensor]]]]:
    """Where to draw the numbers of a part, some at a time, and what of them goes where afterwards: nothing where they
    are drawn into their place. Of a rank's part all are drawn, so that it has those that one rank would have."""
    if part.cut is None:
        for chunk in out.view(-1).split(CHUNK_ELEMENTS):
            yield chunk, []
        return
    cut, count = part.cut, math.prod(part.cut.shape)
    out[part.held_shape[0] :].zero_()
    scratch = out.new_empty(min(count, CHUNK_ELEMENTS))
    width = math.prod(cut.shape[1:])
    for first in range(0, count, CHUNK_ELEMENTS):
        chunk = scratch[: min(CHUNK_ELEMENTS, count - first)]
        yield chunk, _kept(cut, out, chunk, first, width)


def _kept(cut: TensorCut, out: Tensor, chunk: Tensor, first: int, width: int) -> list[tuple[Tensor, Tensor]]:
    """Of the numbers from the `first` of a whole tensor on, which has rows of `width`, those that are wanted."""
    behind, kept, at = first + len(chunk), [], 0
    for begin, end in cut.runs:
        if cut.axis == 0:
            low, high = max(first, begin * width), min(behind, end * width)
            if low < high:
                place = at * width - begin * width
                kept.append((chunk[low - first : high - first], out.view(-1)[place + low : place + high]))
        else:
            # The rows that begin in the chunk or before it: whole ones at once, those at its ends by themselves.
            rows = [first // width, -(-first // width), behind // width, -(-behind // width)]
            for top, bottom in ((rows[0], rows[1]), (rows[1], rows[2]), (max(rows[1], rows[2]), rows[3])):
                if top < bottom:
                    left, right = max(begin, first - top * width), min(end, behind - (bottom - 1) * width)
                    if left < right:
                        start = top * width + left - first
                        shape, strides = (bottom - top, right - left), (width, 1)
                        source = chunk.as_strided(shape, strides, chunk.storage_offset() + start)
                        kept.append((source, out[top:bottom, at + left - begin : at + right - begin]))
        at += end - begin
    return kept
