"""The operations as few torch calls as possible, on any device. Shapes and meaning: `reference`.

What the decode step costs on a CPU beside its products is the number of calls, so each takes one to four.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from lightllmd.kernels.reference import ACTIVATIONS

# A mask for queries that follow a cached prefix has at most this many rows: bounds its memory.
MASK_ROWS = 512


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, eps)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return ACTIVATIONS[activation](gate).mul_(up)


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
        position = torch.arange(start + first, end, device=q.device)
        visible = torch.arange(end, device=q.device)[None] <= position[:, None]
        parts.append(
            functional.scaled_dot_product_attention(
                queries[:, :, first:last],
                keys[:, :, :end],
                values[:, :, :end],
                attn_mask=visible,
                scale=scale,
                enable_gqa=True,
            )
        )
    return torch.cat(parts, 2)[0].transpose(0, 1)
