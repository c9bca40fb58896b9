"""What loading yields, whatever it reads from."""

from __future__ import annotations

from collections.abc import Callable
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


def room(parts: tuple[Part, ...], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """An empty tensor for `parts` stacked along the first dimension."""
    return torch.empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), dtype=dtype, device=device)
