"""Attention as few torch calls as possible, over rows gathered in groups. Shapes and meaning: `reference`."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from lightllmd.kernels.eager_ops import rms_norm
from lightllmd.kernels.layout import Batch, GatheredRows, Heads

# A mask for queries that follow a cached prefix has at most this many rows: bounds its memory (config.bounds).
MASK_ROWS = 512


def attention(
    qkv: Tensor,
    cache: Tensor,
    batch: Batch[GatheredRows],
    heads: Heads,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    wanted: Tensor | None = None,
) -> Tensor:
    rows = batch.metadata
    qkv = qkv.view(-1, heads.query + 2 * heads.kv, heads.dim)
    q, k = qkv[:, : heads.query], qkv[:, heads.query : heads.query + heads.kv]
    if q_norm is not None and k_norm is not None:
        q.copy_(rms_norm(q, q_norm, heads.norm_eps))
        k.copy_(rms_norm(k, k_norm, heads.norm_eps))
    rotate_(qkv[:, : heads.query + heads.kv], rows.cos, rows.sin)
    write_kv(cache, batch.slots, qkv[:, heads.query :])
    if len(rows.decode) == 1 and rows.decode[0].tokens is None:
        group = rows.decode[0]
        attended = decode_attention(q, cache, group.slots, group.mask, heads.scale)
    else:
        attended = torch.empty_like(q)
        for group in rows.decode:
            attended[group.tokens] = decode_attention(q[group.tokens], cache, group.slots, group.mask, heads.scale)
        for row in rows.prefill:
            span = slice(row.first, row.first + row.count)
            attended[span] = prefill_attention(q[span], cache, row.slots, row.start, heads.scale)
    attended = attended.flatten(1)
    return attended if wanted is None else attended.index_select(0, wanted)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """In place on ``x [T, heads, D]``, which may be a slice of the fused qkv."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    x.mul_(cos).addcmul_(swapped, sin)


def write_kv(cache: Tensor, slots: Tensor, kv: Tensor) -> None:
    cache.index_copy_(0, slots, kv)


def decode_attention(q: Tensor, cache: Tensor, slots: Tensor | slice, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of rows with one new token each: ``q [B, H, D]`` -> ``[B, H, D]``.

    `slots` is ``[B * L]``, each row padded to L with a slot of its own (never a foreign one: what an unowned slot
    holds, NaN included, must not be read), or a slice where B is 1. `mask` ``[B, 1, 1, L]`` is 0 or -inf.
    The queries of a group become the query positions of their key/value head: no copy of keys or values.
    """
    rows, heads, dim = q.shape
    kv_heads = cache.shape[1] // 2
    kept = cache[slots] if isinstance(slots, slice) else cache.index_select(0, slots)
    kept = kept.view(rows, -1, 2 * kv_heads, dim).transpose(1, 2)
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, dim)
    out = functional.scaled_dot_product_attention(
        grouped, kept[:, :kv_heads], kept[:, kv_heads:], attn_mask=mask, scale=scale
    )
    return out.reshape(rows, heads, dim)


def prefill_attention(q: Tensor, cache: Tensor, slots: Tensor | slice, start: int, scale: float) -> Tensor:
    """Causal attention of one row: ``q [t, H, D]`` at positions ``start ..``, `slots` of all ``start + t`` tokens."""
    count = q.shape[0]
    kv_heads = cache.shape[1] // 2
    kept = cache[slots] if isinstance(slots, slice) else cache.index_select(0, slots)
    kept = kept.transpose(0, 1).unsqueeze(0)
    keys, values = kept[:, :kv_heads], kept[:, kv_heads:]
    queries = q.transpose(0, 1).unsqueeze(0)
    if start == 0:
        out = functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    parts = []
    for first in range(0, count, MASK_ROWS):
        last = min(count, first + MASK_ROWS)
        end = start + last
        mask = q.new_zeros(last - first, end)
        mask[:, start + first :] = q.new_full((last - first, last - first), float("-inf")).triu_(1)
        parts.append(
            functional.scaled_dot_product_attention(
                queries[:, :, first:last],
                keys[:, :, :end],
                values[:, :, :end],
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )
        )
    return torch.cat(parts, 2)[0].transpose(0, 1)
