"""Attention as few torch calls as possible, over rows gathered in groups. Shapes and meaning: `reference`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

from lightllmd.kernels.eager_ops import rms_norm
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.layout import Batch, DecodeGroup, GatheredRows, Heads, PrefillRow, Slots

# A mask for queries that follow a cached prefix has at most this many rows: bounds its memory (config.bounds).
MASK_ROWS = 512


def attention(
    qkv: Tensor,
    cache: LayerCache,
    batch: Batch[GatheredRows],
    heads: Heads,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    wanted: Tensor | None = None,
) -> Tensor:
    """As `dispatch.Kernels.attention`."""
    rows = batch.metadata
    qkv = qkv.view(-1, heads.query + 2 * heads.kv, heads.dim)
    q, k = qkv[:, : heads.query], qkv[:, heads.query : heads.query + heads.kv]
    if q_norm is not None and k_norm is not None:
        q.copy_(rms_norm(q, q_norm, heads.norm_eps, heads.norm_offset))
        k.copy_(rms_norm(k, k_norm, heads.norm_eps, heads.norm_offset))
    if rows.cos is not None and rows.sin is not None:
        kind = slice(heads.rotary, heads.rotary + 1)
        rotate_(qkv[:, : heads.query + heads.kv], rows.cos[:, kind], rows.sin[:, kind])
    cache.store(batch.slots, qkv[:, heads.query :])
    if len(rows.decode) == 1 and rows.decode[0].tokens is None:
        attended = decode_attention(q, cache, heads, rows.decode[0])
    else:
        attended = torch.empty_like(q)
        for group in rows.decode:
            attended[group.tokens] = decode_attention(q[group.tokens], cache, heads, group)
        for row in rows.prefill:
            span = slice(row.first, row.first + row.count)
            attended[span] = prefill_attention(q[span], cache, heads, row)
    attended = attended.flatten(1)
    return attended if wanted is None else attended.index_select(0, wanted)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """In place on ``x [T, heads, D]``, which may be a slice of the fused qkv."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    x.mul_(cos).addcmul_(swapped, sin)


def decode_attention(q: Tensor, cache: LayerCache, heads: Heads, group: DecodeGroup) -> Tensor:
    """Attention of rows with one new token each: ``q [B, H, D]`` -> ``[B, H, D]``.

    The queries that share a key/value head become its query positions: no copy of keys or values.
    """
    slots, mask = group.slots, group.mask
    if heads.window is not None:
        slots, mask = _newest(slots, mask, len(q), heads.window)
    keys, values = (kept.view(len(q), -1, *kept.shape[1:]).transpose(1, 2) for kept in cache.gather(slots))
    grouped = q.reshape(len(q), heads.kv, heads.query // heads.kv, heads.dim)
    if heads.soft_cap is not None:
        out = _soft_capped(grouped, keys, values, heads, mask)
    else:
        out = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=heads.scale)
    return out.reshape(q.shape)


def prefill_attention(q: Tensor, cache: LayerCache, heads: Heads, row: PrefillRow) -> Tensor:
    """Causal attention of one row: ``q [t, H, D]``, its newest tokens, -> ``[t, H, D]``."""
    start, length = row.start, row.start + row.count
    queries = q.transpose(0, 1).unsqueeze(0)
    keys, values = (kept.transpose(0, 1).unsqueeze(0) for kept in cache.gather(row.slots))
    window = heads.window if heads.window is not None and heads.window < length else None
    if start == 0 and window is None and heads.soft_cap is None and not row.bidirectional:
        out = functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=heads.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    at_once = MASK_ROWS if heads.soft_cap is None else max(1, MASK_ROWS * heads.kv // heads.query)
    parts = []
    for first in range(0, row.count, at_once):
        last = min(row.count, first + at_once)
        # The keys that any of these queries sees.
        low, end = 0 if window is None else max(0, start + first + 1 - window), start + last
        mask = _causal_mask(q, start + first - low, last - first, window)
        runs = [run for run in row.bidirectional if run[0] < end and start + first < run[1]]
        if runs:
            mask, end = _with_runs(mask, end, start + first, runs)
        seen = queries[:, :, first:last], keys[:, :, low:end], values[:, :, low:end]
        if heads.soft_cap is not None:
            parts.append(_soft_capped(*seen, heads, mask))
        else:
            parts.append(
                functional.scaled_dot_product_attention(*seen, attn_mask=mask, scale=heads.scale, enable_gqa=True)
            )
    return torch.cat(parts, 2)[0].transpose(0, 1)


def _newest(slots: Slots, mask: Tensor | None, rows: int, window: int) -> tuple[Slots, Tensor | None]:
    """The last `window` tokens of each row of a `DecodeGroup`, padded to the longest again."""
    if isinstance(slots, slice):
        return slice(max(slots.start, slots.stop - window), slots.stop), None
    slots = slots.view(rows, -1)
    longest = slots.shape[1]
    if longest <= window:
        return slots.flatten(), mask
    if mask is None:
        return slots[:, longest - window :].flatten(), None
    lengths = (mask == 0).sum(-1).view(rows, 1)
    kept = (lengths - window).clamp(min=0) + torch.arange(window, device=slots.device)
    return slots.gather(1, kept).flatten(), mask.gather(-1, kept[:, None, None])


def _causal_mask(like: Tensor, before: int, count: int, window: int | None) -> Tensor:
    """``[count, before + count]``, 0 or -inf: queries behind `before` keys see these, and those up to their own, as far
    as they are within the window."""
    mask = like.new_zeros(count, before + count)
    hidden = like.new_full((count, count), float("-inf"))
    mask[:, before:] = hidden.triu(1)
    if window is not None:
        mask[:, :count] += hidden.tril(before - window)
    return mask


def _with_runs(mask: Tensor, end: int, first: int, runs: Sequence[tuple[int, int]]) -> tuple[Tensor, int]:
    """Of queries from the token `first` to before `end` over keys up to `end`: each token of a run sees those behind
    it up to the run's end. Returns the mask with its keys, which may be more, and where they end."""
    behind = max(0, runs[-1][1] - end)
    mask = functional.pad(mask, (0, behind), value=float("-inf"))
    low = end + behind - mask.shape[1]
    for begin, run_end in runs:
        begin = max(begin, first)
        later = mask[begin - first : run_end - first, begin - low : run_end - low]
        later.masked_fill_(torch.ones_like(later, dtype=torch.bool).triu(), 0)
    return mask, end + behind


def _soft_capped(q: Tensor, keys: Tensor, values: Tensor, heads: Heads, mask: Tensor | None) -> Tensor:
    """Attention of ``q [B, H, t, D]`` over keys and values ``[B, K, L, D]``, whose scores s become ``cap * tanh(s /
    cap)`` (Gemma Team 2024, Gemma 2); `mask` is added to ``[B, H, t, L]``. H is a multiple of K.

    torch's own attention has no cap. One key/value head at a time, in fp32: scores of 16 bits would be rounded to
    an eighth below a cap of 50.
    """
    assert heads.soft_cap is not None
    out = torch.empty_like(q)
    for kv_head, (queries, target) in enumerate(zip(q.chunk(heads.kv, 1), out.chunk(heads.kv, 1), strict=True)):
        scores = queries.flatten(1, 2).float() @ keys[:, kv_head].float().transpose(1, 2)
        scores.mul_(heads.scale / heads.soft_cap).tanh_().mul_(heads.soft_cap)
        if mask is not None:
            scores.view(*queries.shape[:3], -1).add_(mask)
        target.copy_((scores.softmax(-1) @ values[:, kv_head].float()).view(queries.shape))
    return out
