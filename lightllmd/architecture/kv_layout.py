"""How the KV cache stores a token's keys and values: what the budget plans with and the runners allocate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lightllmd.architecture.dtypes import ITEM_BYTES
from lightllmd.architecture.kv_schemes import DENSE_KV, KV_SCHEMES, SCALE_BYTES, KvScheme
from lightllmd.architecture.spec import GroupedQuery


@dataclass(frozen=True)
class LayerKvLayout:
    """One layer's part of a slot: keys ``[kv_heads, head_dim]``, then values of the same shape."""

    kv_heads: int
    head_dim: int
    dtype: str  # of what is stored and read, by torch's name
    scheme: KvScheme = DENSE_KV

    @property
    def shape(self) -> tuple[int, int]:
        """Of a slot's stored elements: its keys are the first half of the heads, its values the second."""
        return 2 * self.kv_heads, self.head_dim // self.scheme.packed

    @property
    def scales_shape(self) -> tuple[int, int, int]:
        """Of a slot's scales, in fp16: of each head those of its keys and of its values, side by side."""
        return self.kv_heads, 2, self.scheme.scales(self.head_dim)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one token's stored elements."""
        heads, dim = self.shape
        return heads * dim * (ITEM_BYTES[self.dtype] if self.scheme.dense else 1)

    @property
    def scale_bytes(self) -> int:
        """Bytes of one token's scales."""
        return math.prod(self.scales_shape) * SCALE_BYTES

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token's keys and values in this layer."""
        return self.entry_bytes + self.scale_bytes

    @property
    def gathered_bytes(self) -> int:
        """Bytes of one token's keys and values where they are gathered for attention."""
        return 2 * self.kv_heads * self.head_dim * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class KvLayout:
    """All layers' parts, in their order. A slot is one token's place in each of them."""

    layers: tuple[LayerKvLayout, ...]

    @classmethod
    def of(cls, attention: Iterable[GroupedQuery], dtype: str, kv_scheme: str = "dense") -> KvLayout:
        """Of a model with such attention, layer by layer, that computes with elements of `dtype`, by torch's name.
        All layers' heads are of a size that the scheme divides."""
        scheme = KV_SCHEMES[kv_scheme]
        return cls(tuple(LayerKvLayout(each.kv_heads, each.head_dim, dtype, scheme) for each in attention))

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return sum(layer.slot_bytes for layer in self.layers)
