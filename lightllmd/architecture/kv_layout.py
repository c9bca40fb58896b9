"""How the KV cache stores a token's keys and values: what the budget plans with and the runners allocate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightllmd.architecture.dtypes import ITEM_BYTES
from lightllmd.architecture.spec import GroupedQuery


@dataclass(frozen=True)
class LayerKvLayout:
    """One layer's part of a slot: keys ``[kv_heads, head_dim]``, then values of the same shape."""

    kv_heads: int
    head_dim: int
    dtype: str  # of the stored elements, by torch's name

    @property
    def shape(self) -> tuple[int, int]:
        """Of a slot's elements: its keys are the first half of the heads, its values the second."""
        return 2 * self.kv_heads, self.head_dim

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token's keys and values in this layer."""
        heads, dim = self.shape
        return heads * dim * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class KvLayout:
    """All layers' parts, in their order. A slot is one token's place in each of them."""

    layers: tuple[LayerKvLayout, ...]

    @classmethod
    def of(cls, attention: Iterable[GroupedQuery], dtype: str) -> KvLayout:
        """Of a model with such attention, layer by layer, that stores elements of `dtype`, by torch's name."""
        return cls(tuple(LayerKvLayout(each.kv_heads, each.head_dim, dtype) for each in attention))

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return sum(layer.slot_bytes for layer in self.layers)
