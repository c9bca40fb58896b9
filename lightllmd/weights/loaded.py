"""What loading yields, whatever it reads from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightllmd.architecture.weights import Part, WeightSpec
from lightllmd.kernels.quantised import QuantisedMatrix

Progress = Callable[[int, int], None]  # (bytes of the checkpoint read, bytes in all)


class LoadedWeight(NamedTuple):
    """A weight with its values: the parts of `spec` stacked along the first dimension, and its bias likewise."""

    spec: WeightSpec
    tensor: Tensor | QuantisedMatrix
    bias: Tensor | None


class Rooms:
    """Empty tensors that weights are read into.

    Those of `passing`, of which nothing is kept when the next is asked for (they are quantised), share one: memory that
    each took for itself would be left in pieces among what is kept.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | None, passing: Iterable[WeightSpec] = ()) -> None:
        self._dtype, self._device = dtype, device
        sizes = {weight.key: sum(math.prod(part.shape) for part in weight.parts) for weight in passing}
        self._passing = sizes.keys()
        self._shared = torch.empty(max(sizes.values()), dtype=dtype, device=device) if sizes else None

    def of(self, weight: WeightSpec) -> Tensor:
        """For its parts, stacked along the first dimension."""
        if self._shared is None or weight.key not in self._passing:
            return room(weight.parts, self._dtype, self._device)
        rows, columns = sum(part.shape[0] for part in weight.parts), weight.parts[0].shape[1]
        return self._shared[: rows * columns].view(rows, columns)


def room(parts: tuple[Part, ...], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """An empty tensor for `parts` stacked along the first dimension."""
    return torch.empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), dtype=dtype, device=device)
