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
    """What rank `rank` of a tensor-parallel group of `ranks` holds of a weight ``[out, in]`` (Shoeybi et al. 2019).

    axis 0: a part of the outputs, and of the bias. axis 1: a part of the inputs; the outputs of all ranks are summed,
    to which one of them has added the bias. None: all of it.
    """

    rank: int = 0
    ranks: int = 1
    axis: Literal[0, 1] | None = None


WHOLE = Shard()
ANY = "any"  # the entry of a device's linears that takes every scheme


def built(role: str, scheme: Scheme, shard: Shard, kinds: Mapping[str, T]) -> T:
    """The entry of `kinds`, a device's linears by scheme. Raises EngineError naming what is not built for `role`.

    A linear made for the schemes of `SCHEMES` alone says so in `takes(scheme)`: of what checkpoints have beside them
    (8 bits in groups or with zeros, another size of blocks, static inputs, an order of columns) those that it does not
    take are stored as that of "any" has them.
    """
    if scheme.name not in kinds:
        raise EngineError(f"{role}: this device has no kernels for weights stored as {scheme.name!r}")
    if shard.ranks != 1:
        raise EngineError(f"{role}: rank {shard.rank} of {shard.ranks} was asked for, one rank is built")
    kind = kinds[scheme.name]
    takes = getattr(kind, "takes", None)
    return kind if takes is None or takes(scheme) else kinds[ANY]
