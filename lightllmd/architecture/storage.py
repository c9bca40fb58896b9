"""What weights take in memory: a fold over the list of weights, the scheme that stores them, and the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from lightllmd.architecture.weights import Part, WeightSpec


class Scheme(Protocol):
    """How matrices are stored on the device."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Of a matrix ``[out, in]``, scales included."""


@dataclass(frozen=True)
class Dense:
    """Elements of the dtype that the model computes in, `item_bytes` each."""

    item_bytes: int

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Of a tensor of that shape."""
        return math.prod(shape) * self.item_bytes


def weight_bytes(weights: Iterable[WeightSpec], dense: Dense, scheme: Scheme | None = None, ranks: int = 1) -> int:
    """Bytes on each of `ranks` devices. `scheme` stores what may be quantised (None: dense), `dense` all else."""
    total = 0
    for weight in weights:
        matrix = scheme if scheme is not None and weight.quantisable else dense
        total += sum(matrix.nbytes(_on_a_rank(part, weight.shard_axis, ranks)) for part in weight.parts)
        along = 0 if weight.shard_axis == 0 else None
        total += sum(dense.nbytes(_on_a_rank(part, along, ranks)) for part in weight.bias)
    return total


def _on_a_rank(part: Part, axis: int | None, ranks: int) -> tuple[int, ...]:
    """The shape of the largest share: whole units, at least one, which several ranks hold where there are too few."""
    if axis is None or ranks == 1:
        return part.shape
    units = part.shape[axis] // part.shard_unit
    share = -(-units // ranks) * part.shard_unit
    return (*part.shape[:axis], share, *part.shape[axis + 1 :])
