"""What weights take in memory: a fold over the list of weights, and the schemes that store them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lightllmd.architecture.schemes import DENSE, Scheme
from lightllmd.architecture.weight_schemes import ALL_DENSE, WeightSchemes
from lightllmd.architecture.weights import WeightSpec


def weight_bytes(
    weights: Iterable[WeightSpec],
    item_bytes: int,
    schemes: WeightSchemes = ALL_DENSE,
    nbytes: Callable[[Scheme, tuple[int, ...], int], int] = Scheme.nbytes,
) -> int:
    """Bytes of weights, or of one rank's (`ranks.architecture_of_rank`), in a model that computes with elements of
    `item_bytes`. `nbytes`: what a scheme takes on its device."""
    total = 0
    for weight in weights:
        scheme = schemes.of(weight)
        total += sum(nbytes(scheme, part.shape, item_bytes) for part in weight.parts)
        total += sum(DENSE.nbytes(part.shape, item_bytes) for part in weight.bias)
    return total
