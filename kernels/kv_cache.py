"""The KV cache of one device: a layer's keys and values by token slot. Triton's side of it is `kv_access`."""

from __future__ import annotations

import torch
from torch import Tensor

from lightllmd.architecture.kv_layout import KvLayout, LayerKvLayout
from lightllmd.architecture.kv_schemes import DENSE_KV, KvScheme
from lightllmd.kernels.layout import Slots
from lightllmd.kernels.quantised_kv import dequantise, quantise

AT_ONCE = 1 << 19  # elements that are dequantised at a time: bounds the copies in fp32, which fit into a CPU's caches
ALIGNED = 16  # bytes: where each layer's scales begin, as whole vectors of a load


class LayerCache:
    """One layer's keys and values. Owned by a runner, carried through the decoder, read and written by attention."""

    scheme: KvScheme = DENSE_KV
    scales: Tensor | None = None

    def __init__(self, entries: Tensor) -> None:
        """`entries`: ``[S, 2K, D]``, the keys of a slot in heads 0 to K - 1, its values in K to 2K - 1. The last two
        dimensions are contiguous."""
        self.entries = entries

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored; the first dimension is that of slots."""
        return (self.entries,)

    def store(self, slots: Tensor, kv: Tensor) -> None:
        """Writes ``kv [T, 2K, D]``, keys before values, at ``slots [T]`` int64."""
        self.entries.index_copy_(0, slots, kv)

    def clear(self, slot: int) -> None:
        """Its keys and values become zeros."""
        self.entries[slot] = 0

    def gather(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """Keys and values ``[N, K, D]`` at N slots: of a copy, or a view where they are a run."""
        kept = self.entries[slots] if isinstance(slots, slice) else self.entries.index_select(0, slots)
        keys, values = kept.chunk(2, 1)
        return keys, values


class QuantisedLayerCache(LayerCache):
    """`LayerCache` of keys and values that are quantised when they are stored, and read as `quantised_kv` has them."""

    scales: Tensor

    def __init__(self, entries: Tensor, scales: Tensor, scheme: KvScheme, dtype: torch.dtype) -> None:
        """`entries`: ``[S, 2K, D / packed]``, heads as those of a `LayerCache`; `scales`: fp16 ``[S, K, 2, G]``, those
        of keys before those of values, ``2G`` of a scheme that is not symmetric. All but the first dimension of both
        are contiguous. `dtype` is that of what is stored and gathered."""
        super().__init__(entries)
        self.scales, self.scheme, self._dtype = scales, scheme, dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.entries, self.scales

    def store(self, slots: Tensor, kv: Tensor) -> None:
        values, scales = quantise(kv, self.scheme)
        self.entries.index_copy_(0, slots, values)
        self.scales.index_copy_(0, slots, scales.unflatten(1, (2, -1)).transpose(1, 2))

    def clear(self, slot: int) -> None:
        self.entries[slot] = 0
        self.scales[slot] = 0

    def gather(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """Always of a copy; no more than that is dequantised."""
        count = slots.stop - slots.start if isinstance(slots, slice) else len(slots)
        _, heads, dim = self.entries.shape
        kept = self.entries.new_empty((count, heads, dim * self.scheme.packed), dtype=self._dtype)
        step = max(1, AT_ONCE // kept[0].numel()) if count else 1
        for first in range(0, count, step):
            last = min(count, first + step)
            if isinstance(slots, slice):
                values, scales = (part[slots.start + first : slots.start + last] for part in self.tensors)
            else:
                values, scales = (part.index_select(0, slots[first:last]) for part in self.tensors)
            kept[first:last] = dequantise(values, scales.transpose(1, 2).flatten(1, 2), self.scheme)
        keys, values = kept.chunk(2, 1)
        return keys, values


def allocate(layout: KvLayout, slots: int, device: torch.device) -> list[LayerCache]:
    """A cache for each layer, in one block of memory, scales behind all entries. What the slots hold is undefined."""
    sizes = [slots * layer.entry_bytes for layer in layout.layers]
    sizes += [-(-slots * layer.scale_bytes // ALIGNED) * ALIGNED for layer in layout.layers]
    parts = torch.empty(sum(sizes), dtype=torch.uint8, device=device).split(sizes)
    count = len(layout.layers)
    return [_cache(*each, slots) for each in zip(layout.layers, parts[:count], parts[count:], strict=True)]


def _cache(layer: LayerKvLayout, entries: Tensor, scales: Tensor, slots: int) -> LayerCache:
    scheme, dtype = layer.scheme, getattr(torch, layer.dtype)
    if scheme.dense:
        return LayerCache(entries.view(dtype).view(slots, *layer.shape))
    values = entries.view(getattr(torch, scheme.storage)).view(slots, *layer.shape)
    factors = scales.view(torch.float16)[: slots * layer.scale_bytes // 2].view(slots, *layer.scales_shape)
    return QuantisedLayerCache(values, factors, scheme, dtype)
