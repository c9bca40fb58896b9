"""What the ranks of a tensor-parallel group tell each other within a step.

A rank computes with a part of each weight (`architecture.ranks`); here their results are put together. All ranks call
the same methods in the same order, with tensors of the same shapes, and get the same numbers, to the bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Group(ABC):
    """The ranks of one model, as one of them sees it. Of one rank nothing here is called (`Kernels`)."""

    rank: int = 0
    ranks: int = 1

    @abstractmethod
    def sum_(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``residual + sum over ranks of x``, ``[T, N]``, in fp32, rounded once; both are given away, and the result
        may be in the memory of either. Every rank has the same `residual`."""

    @abstractmethod
    def sum_small(self, x: Tensor) -> Tensor:
        """The sum over ranks of fp32 ``x [T, C]``, a few numbers a token."""

    @abstractmethod
    def max_(self, x: Tensor) -> Tensor:
        """The largest over ranks of fp32 ``x [T, G]``, none negative, a few numbers a token; given away."""

    @abstractmethod
    def gather_columns(self, part: Tensor, columns: int) -> Tensor:
        """fp32 ``part [R, P]`` of each rank side by side, in the order of their indices: the first `columns` of them,
        ``[R, columns]``, contiguous."""


class Alone(Group):
    """One rank."""

    def sum_(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return x if residual is None else residual.add_(x)

    def sum_small(self, x: Tensor) -> Tensor:
        return x

    def max_(self, x: Tensor) -> Tensor:
        return x

    def gather_columns(self, part: Tensor, columns: int) -> Tensor:
        return part[:, :columns].contiguous()


ALONE = Alone()
