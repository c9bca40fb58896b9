"""How elements of the KV cache are stored: what the budget plans with and the caches of each device are made by.

All are plain data. A plan names one; `kernels.quantised_kv` says what the stored numbers are, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KvSchemeName = Literal["dense", "int8", "int8_group8", "int4_group8", "int4", "fp8"]
SCALE_BYTES = 2  # scales are fp16 in models of any dtype


@dataclass(frozen=True)
class KvScheme:
    """A way to store the keys and values of a head of a token.

    A value stands for ``scale * value``, or ``scale * value + least`` where the scheme is not symmetric; `scale`, and
    `least` behind it, are those of the value's group.
    """

    name: KvSchemeName
    values: str = ""  # torch's name of the stored values' dtype; "int4" and "uint4": two in a byte; "": the model's
    group: int = 0  # neighbouring elements of a head that share a scale, see `group_of`; 0: all of a head
    symmetric: bool = True

    @property
    def dense(self) -> bool:
        """It stores what it is given."""
        return not self.values

    @property
    def packed(self) -> int:
        """Values in a byte, or in an element of the model's dtype; an even one is in the low bits."""
        return 2 if self.values in ("int4", "uint4") else 1

    @property
    def storage(self) -> str:
        """torch's name of the dtype of the tensor that the values are in; "": the model's. What torch can't move in
        the dtype that it is of is stored as bytes."""
        return self.values if self.values in ("", "int8") else "uint8"

    def group_of(self, head_dim: int) -> int:
        """Neighbouring elements of a head of that size that share a scale: `group`, halved until it divides a head."""
        group = self.group or head_dim
        while head_dim % group:
            group //= 2
        return group

    def groups(self, head_dim: int) -> int:
        """Of a head."""
        return head_dim // self.group_of(head_dim)

    def scales(self, head_dim: int) -> int:
        """fp16 numbers of a head: the scales of its groups, and the least values behind them."""
        return 0 if self.dense else self.groups(head_dim) * (1 if self.symmetric else 2)

    def divides(self, head_dim: int) -> bool:
        """Whether heads of this size are whole bytes."""
        return head_dim % self.packed == 0


DENSE_KV = KvScheme("dense")
KV_SCHEMES: dict[str, KvScheme] = {
    scheme.name: scheme
    for scheme in [
        DENSE_KV,
        KvScheme("int8", values="int8"),
        KvScheme("int8_group8", values="int8", group=8),
        KvScheme("int4_group8", values="int4", group=8),
        KvScheme("int4", values="uint4", group=16, symmetric=False),
        KvScheme("fp8", values="float8_e4m3fn"),
    ]
}
