"""Random weights in a model's layout, made where they stay: for measuring without a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightllmd.weights.layout import Layout, Part, Progress, Weight

MATRIX_STD, VECTOR_STD = 0.02, 0.01  # usual initialisation; norms and biases move a little, so that they matter
CHUNK_ELEMENTS = 8 << 20  # drawn at a time: a CPU takes a tenth of a second for them


def stream(layout: Layout, dtype: torch.dtype, device: torch.device, progress: Progress) -> Iterator[Weight]:
    """Yields (key, tensor, bias) in the layout's order, as `place.stream` does.

    Matrices are normal around 0, norms around 1, biases around 0. Each part has its own seed, its number in the layout:
    every start on the same kind of device gives the same numbers, and so does a part that is made alone.
    """
    every = [part for target in layout.targets for part in target.parts + target.bias]
    item = dtype.itemsize
    total = sum(math.prod(part.shape) for part in every) * item
    generator = torch.Generator(device)
    done = drawn = 0

    def stacked(parts: tuple[Part, ...], mean: float) -> Tensor:
        nonlocal done, drawn
        out = torch.empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), dtype=dtype, device=device)
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
                done += chunk.numel() * item
                progress(done, total)
            row += part.shape[0]
        return out

    for target in layout.targets:
        yield target.key, stacked(target.parts, 1.0), stacked(target.bias, 0.0) if target.bias else None
