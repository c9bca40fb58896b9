"""The KV cache of one device: a layer's keys and values by token slot. Triton's side of it is `kv_access`."""

from __future__ import annotations

import torch
from torch import Tensor

from lightllmd.architecture.kv_layout import KvLayout
from lightllmd.kernels.layout import Slots


class LayerCache:
    """One layer's keys and values. Owned by a runner, carried through the decoder, read and written by attention."""

    def __init__(self, entries: Tensor) -> None:
        """`entries`: ``[S, 2K, D]``, the keys of a slot in heads 0 to K - 1, its values in K to 2K - 1. The last two
        dimensions are contiguous."""
        self.entries = entries

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


def allocate(layout: KvLayout, slots: int, device: torch.device) -> list[LayerCache]:
    """A cache for each layer, in one block of memory. What the slots hold is undefined."""
    block = torch.empty(slots * layout.slot_bytes, dtype=torch.uint8, device=device)
    parts = block.split([slots * layer.slot_bytes for layer in layout.layers])
    return [
        LayerCache(part.view(getattr(torch, layer.dtype)).view(slots, *layer.shape))
        for part, layer in zip(parts, layout.layers, strict=True)
    ]
