"""What weights take in memory: a fold over the list of weights, the schemes that store them, and the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lightllmd.architecture.schemes import DENSE, Scheme
from lightllmd.architecture.weight_schemes import ALL_DENSE, WeightSchemes
from lightllmd.architecture.weights import Part, WeightSpec


def weight_bytes(
    weights: Iterable[WeightSpec],
    item_bytes: int,
    schemes: WeightSchemes = ALL_DENSE,
    ranks: int = 1,
    nbytes: Callable[[Scheme, tuple[int, ...], int], int] = Scheme.nbytes,
) -> int:
    """Bytes on each of `ranks` devices of a model that computes with elements of `item_bytes`. `nbytes`: what a scheme
    takes on such a device."""
    total = 0
    for weight in weights:
        scheme = schemes.of(weight)
        total += sum(nbytes(scheme, _on_a_rank(part, weight.shard_axis, ranks), item_bytes) for part in weight.parts)
        along = 0 if weight.shard_axis == 0 else None
        total += sum(DENSE.nbytes(_on_a_rank(part, along, ranks), item_bytes) for part in weight.bias)
    return total


def _on_a_rank(part: Part, axis: int | None, ranks: int) -> tuple[int, ...]:
    """The shape of the largest share: whole units, at least one, which several ranks hold where there are too few."""
    if axis is None or ranks == 1:
        return part.shape
    units = part.shape[axis] // part.shard_unit
    share = -(-units // ranks) * part.shard_unit
    return (*part.shape[:axis], share, *part.shape[axis + 1 :])
