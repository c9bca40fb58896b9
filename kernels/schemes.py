"""Which part of a weight a rank holds, and which linear a device has for a scheme of storing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from lightllmd.architecture.schemes import Scheme
from lightllmd.errors import EngineError

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """What one rank of a tensor-parallel group holds of a weight ``[out, in]`` (Shoeybi et al. 2019).

    axis 0: some of the outputs, and of the bias. axis 1: some of the inputs; the outputs of all ranks are summed, to
    which one of them has added the bias. None: all of it.
    """

    axis: Literal[0, 1] | None = None
    begin: int = 0  # the first row or column that it holds
    size: int = 0  # rows or columns of the whole weight
    rounded_together: int = 0  # as `architecture.weights.WeightSpec.rounded_together`


WHOLE = Shard()
ANY = "any"  # the entry of a device's linears that takes every scheme


def built(role: str, scheme: Scheme, kinds: Mapping[str, T]) -> T:
    """The entry of `kinds`, a device's linears by scheme. Raises EngineError naming what is not built for `role`.

    A linear made for the schemes of `SCHEMES` alone says so in `takes(scheme)`: of what checkpoints have beside them
    (8 bits in groups or with zeros, another size of blocks, static inputs, an order of columns) those that it does not
    take are stored as that of "any" has them.
    """
    if scheme.name not in kinds:
        raise EngineError(f"{role}: this device has no kernels for weights stored as {scheme.name!r}")
    kind = kinds[scheme.name]
    takes = getattr(kind, "takes", None)
    return kind if takes is None or takes(scheme) else kinds[ANY]
