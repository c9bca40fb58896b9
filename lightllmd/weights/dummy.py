"""Random weights of an architecture, made where they stay: for measuring without a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightllmd.architecture.weights import Part, WeightSpec
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
    total = sum(weight.elements for weight in weights) * dtype.itemsize
    generator = torch.Generator(device)
    done = drawn = 0

    rooms = Rooms(dtype, device, passing)

    def fill(out: Tensor, parts: tuple[Part, ...], mean: float) -> Tensor:
        nonlocal done, drawn
        row = 0
        for part in parts:
            generator.manual_seed(drawn)
            drawn += 1
            values = out[row : row + part.shape[0]].view(-1)
            for chunk in values.split(CHUNK_ELEMENTS):
                if len(part.shape) > 1:
                    chunk.normal_(0.0, MATRIX_STD, generator=generator)
                else:
                    chunk.normal_(mean, VECTOR_STD, generator=generator)
                done += chunk.numel() * dtype.itemsize
                progress(done, total)
            row += part.shape[0]
        return out

    for weight in weights:
        tensor = fill(rooms.of(weight), weight.parts, weight.neutral)
        bias = fill(room(weight.bias, dtype, device), weight.bias, 0.0) if weight.bias else None
        yield LoadedWeight(weight, tensor, bias)
        del tensor, bias  # nothing is kept while the next is made
