"""Rows of a KV cache as the kernels of a GPU see them, with traps all around what belongs to a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightllmd.kernels.kv_cache import LayerCache

SPARE = 5  # slots and table entries that belong to nobody, beside those that the rows need


@dataclass
class KvRows:
    """Each row's slots are scattered. All other slots hold NaN, and all other entries of the table point at them, but
    for the padding: the last table row begins with the last slot, which is a token of zeros."""

    cache: LayerCache
    kv_heads: int
    table: Tensor  # [R, W] int32
    table_rows: list[int]  # of each row
    slots: list[Tensor]  # of each row, in the order of its tokens

    @classmethod
    def of(cls, lengths: list[int], kv_heads: int, dim: int, dtype: torch.dtype, device: str, seed: int = 0) -> KvRows:
        generator = torch.Generator().manual_seed(seed)
        used, rows = sum(lengths), len(lengths)
        order = torch.randperm(used + SPARE, generator=generator)
        owned, traps = order[:used], order[used:]
        cache = torch.full((used + SPARE + 1, 2 * kv_heads, dim), float("nan"))
        cache[owned] = torch.randn(used, 2 * kv_heads, dim, generator=generator)
        cache[-1] = 0
        table_rows = torch.randperm(rows + 2, generator=generator)[:rows].tolist()
        table = traps[torch.randint(SPARE, (rows + 3, max(lengths, default=0) + SPARE), generator=generator)]
        table[-1, 0] = len(cache) - 1
        slots = list(owned.split(lengths))
        for row, own in zip(table_rows, slots, strict=True):
            table[row, : len(own)] = own
        slots = [own.to(device) for own in slots]
        return cls(LayerCache(cache.to(device, dtype)), kv_heads, table.to(device, torch.int32), table_rows, slots)


def int32(numbers: list[int], device: str) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)
