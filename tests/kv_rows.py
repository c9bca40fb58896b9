"""Rows of a KV cache as the kernels of a GPU see them, with traps all around what belongs to a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import kv_reference
from lightllmd.architecture.kv_layout import KvLayout, LayerKvLayout
from lightllmd.architecture.kv_schemes import DENSE_KV, KvScheme
from lightllmd.kernels.kv_cache import LayerCache, allocate

SPARE = 5  # slots and table entries that belong to nobody, beside those that the rows need


@dataclass
class KvRows:
    """Each row's slots are scattered. All other slots hold NaN, and all other entries of the table point at them, but
    for the padding: the last table row begins with the last slot, which is a token of zeros."""

    cache: LayerCache
    kept: Tensor  # [S, 2K, D] of a dtype of floating point: what the cache stands for
    kv_heads: int
    table: Tensor  # [R, W] int32
    table_rows: list[int]  # of each row
    slots: list[Tensor]  # of each row, in the order of its tokens

    @classmethod
    def of(
        cls,
        lengths: list[int],
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        device: str,
        seed: int = 0,
        scheme: KvScheme = DENSE_KV,
    ) -> KvRows:
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
        kept, numbers = stored(cache.to(device, dtype), owned.to(device), scheme)
        return cls(kept, numbers, kv_heads, table.to(device, torch.int32), table_rows, slots)


def stored(numbers: Tensor, owned: Tensor, scheme: KvScheme) -> tuple[LayerCache, Tensor]:
    """A cache of ``numbers [S, 2K, D]``, and what it stands for: at the slots `owned` and the last one; all other
    scales are NaN."""
    if scheme.dense:
        return LayerCache(numbers), numbers
    slots, heads, dim = numbers.shape
    layer = LayerKvLayout(heads // 2, dim, str(numbers.dtype).removeprefix("torch."), scheme)
    [cache] = allocate(KvLayout((layer,)), slots, numbers.device)
    entries, scales = cache.tensors
    entries.fill_(85)
    scales.fill_(float("nan"))
    known = torch.cat([owned, owned.new_tensor([slots - 1])])
    cache.store(known, numbers[known])
    kept = numbers.float()
    values = kv_reference.bytes_of(entries[known]).cpu()
    factors = scales[known].transpose(1, 2).flatten(1, 2).cpu()
    kept[known] = kv_reference.dequantised(values, factors, scheme).to(kept)
    return cache, kept


def int32(numbers: list[int], device: str) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)
