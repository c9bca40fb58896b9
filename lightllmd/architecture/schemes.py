"""How the weight of a linear is stored: what the budget plans with and the linears of each device are made by.

A further scheme is an entry of `SCHEMES`, and for each device that has kernels for it a `kernels.linear.Linear` in its
table. All are plain data, so that a plan can carry them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from lightllmd.architecture.dtypes import ITEM_BYTES

SchemeName = Literal["dense", "w8a16", "w4a16", "w8a8", "fp8", "fp8_block"]


# Of a rank's part of a weight whose columns are in an order of their own: kernels want such groups, and columns.
ORDERED_GROUP, FILLED_COLUMNS = 32, 64


@dataclass(frozen=True)
class Scheme:
    """A way to store a weight ``[out, in]``, and what its inputs are rounded to before they are multiplied with it.

    A value stands for ``scale * value``, or ``scale * (value - zero)`` where the scheme is not symmetric.
    """

    name: SchemeName
    # torch's name of the stored values' dtype, "uint4" for two of 0 to 15 in a byte; "": the model's. "uint8" is of
    # checkpoints with zeros in 8 bits.
    values: str = ""
    scales: str = ""  # likewise of the scales
    group: int = 0  # neighbouring inputs that share a scale, the last group may be shorter; 0: all of a row
    rows: int = 1  # neighbouring outputs that share a scale
    symmetric: bool = True
    inputs: str = ""  # what inputs are rounded to, symmetrically and with a scale for each token; "": nothing
    ordered: bool = False  # columns are in an order of their own (GPTQ's act-order), which is stored, too
    static: bool = False  # inputs have one scale, which a calibration found, instead of one for each token

    @property
    def dense(self) -> bool:
        """It stores the weight as it is."""
        return not self.values

    @property
    def title(self) -> str:
        """Its name, and where it has groups of a size to choose that."""
        return f"{self.name} g{self.group}" if self.group and self.rows == 1 else self.name

    @property
    def tensors(self) -> tuple[str, ...]:
        """What `kernels.linear.Linear.tensors` names, but for a bias."""
        if self.dense:
            return ("weight",)
        zero, order = () if self.symmetric else ("zero",), ("order",) if self.ordered else ()
        return ("weight", "scale", *zero, *order, *(("input_scale",) if self.static else ()))

    @property
    def capability(self) -> tuple[int, int]:
        """The compute capability that a GPU must have; a CPU computes every scheme."""
        return (8, 9) if self.inputs == "float8_e4m3fn" else (8, 0) if self.inputs else (0, 0)

    def groups(self, inputs: int) -> int:
        """Of so many inputs."""
        return -(-inputs // self.group) if self.group else 1

    def cut(self, begin: int) -> Scheme:
        """Of some columns, from `begin` on, of a weight that is stored so: where they begin inside a group it has
        smaller ones, and where columns are in an order of their own, of which any may be missing, it always has."""
        group = math.gcd(ORDERED_GROUP, self.group // 2) or 1 if self.ordered else math.gcd(self.group, begin)
        return replace(self, group=group) if self.group else self

    def cut_columns(self, begin: int, end: int, whole: int) -> int:
        """How many columns there may be of those from `begin` to `end` of a weight of so many: where they are in an
        order of their own, what is left of each group is filled up to smaller ones."""
        columns = end - begin
        if not (self.ordered and self.group):
            return columns
        more = self.groups(whole) * (self.cut(begin).group - 1)
        return -(-(columns + more) // FILLED_COLUMNS) * FILLED_COLUMNS

    def nbytes(self, shape: tuple[int, ...], item_bytes: int) -> int:
        """Of a weight of this shape in a model whose elements have so many bytes."""
        if self.dense:
            return math.prod(shape) * item_bytes
        rows, columns = shape
        scales = rows * self.groups(columns) * (ITEM_BYTES[self.scales] if self.scales else item_bytes)
        zeros = 0 if self.symmetric else rows * self.groups(columns) * (1 if self.values == "uint4" else 2)
        others = (4 * columns if self.ordered else 0) + (4 if self.static else 0)
        return rows * (-(-columns // 2) if self.values == "uint4" else columns) + scales + zeros + others


DENSE = Scheme("dense")
SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in [
        DENSE,
        Scheme("w8a16", values="int8", scales="float32"),
        Scheme("w4a16", values="uint4", group=128, symmetric=False),
        Scheme("w8a8", values="int8", scales="float32", inputs="int8"),
        Scheme("fp8", values="float8_e4m3fn", scales="float32", inputs="float8_e4m3fn"),
        # DeepSeek's (DeepSeek-V3 technical report, 3.3): inputs have a scale for each 128 of a token, too.
        Scheme("fp8_block", values="float8_e4m3fn", scales="float32", group=128, rows=128, inputs="float8_e4m3fn"),
    ]
}


def scheme_of(name: str, group: int | None = None) -> Scheme:
    """The scheme of this name, with so many inputs to a scale where it is one that has groups."""
    scheme = SCHEMES[name]
    return replace(scheme, group=group) if group and scheme.group else scheme
