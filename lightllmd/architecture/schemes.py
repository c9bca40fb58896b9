"""How the weight of a linear is stored: what the budget plans with and the linears of each device are made by.

A further scheme is an entry of `SCHEMES`, and for each device that has kernels for it a `kernels.linear.Linear` in its
table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

SchemeName = Literal["dense"]


@dataclass(frozen=True)
class Scheme:
    """A way to store a weight ``[out, in]``."""

    name: SchemeName
    tensors: tuple[str, ...]  # what `kernels.linear.Linear.tensors` names, but for a bias
    nbytes: Callable[[tuple[int, ...], int], int]  # of a shape ``[out, in]`` and the bytes of an element of the model


def _dense(shape: tuple[int, ...], item_bytes: int) -> int:
    return math.prod(shape) * item_bytes


DENSE = Scheme("dense", ("weight",), _dense)
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in [DENSE]}
