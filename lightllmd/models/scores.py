"""The head of a model that scores: the last norm, then linears in fp32, whatever the decoder computes in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, relu

from lightllmd.config.bounds import POOLED_ROWS
from lightllmd.kernels.dispatch import Kernels
from lightllmd.kernels.linear import Norm


@dataclass(frozen=True, eq=False)
class ScoreLinear:
    """In fp32: ``[out, in]``, and ``[out]`` if it has one."""

    weight: Tensor
    bias: Tensor | None


class Scores:
    """`linears` with ReLU between them. Each row is computed for itself, but for how its sums are rounded."""

    def __init__(self, kernels: Kernels, norm: Norm, linears: list[ScoreLinear]) -> None:
        self._kernels, self._norm, self._linears = kernels, norm, linears

    def __call__(self, hidden: Tensor, places: Tensor) -> Tensor:
        """fp32 ``[R, values]`` of the rows ``places [R]`` of ``hidden [T, hidden]``, POOLED_ROWS of them at a time."""
        return torch.cat([self._values(hidden.index_select(0, part)) for part in places.split(POOLED_ROWS)])

    def _values(self, x: Tensor) -> Tensor:
        self._kernels.normalise_(x, self._norm)
        x = x.float()
        *inner, last = self._linears
        for one in inner:
            x = relu(linear(x, one.weight, one.bias))
        return linear(x, last.weight, last.bias)
