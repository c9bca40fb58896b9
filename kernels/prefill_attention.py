"""Causal attention of the newest tokens of each row over all tokens of the row, which lie in the KV cache already
(FlashAttention-2, Dao 2023). Meaning: `reference.attention`.

A program computes one tile: a run of (token, query head) pairs that share a key/value head, the heads of a token side
by side, so that keys and values are read once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

LOG2_E = 1.4426950408889634


class TileShape(NamedTuple):
    block_m: int  # (token, head) pairs per program; divides the pairs of a tile
    block_n: int  # keys at a time
    warps: int
    stages: int  # slots go two iterations ahead of keys and values, those two ahead of the products: 5


def pairs_per_tile(tokens: int, group: int) -> int:
    """(token, head) pairs of a tile in a step that feeds `tokens`: few tokens are spread over more programs."""
    return 128 if tokens * group >= 4096 else 64


def tile_shape(dtype: torch.dtype, head_dim: int, pairs: int) -> TileShape:
    """What fits into the registers and the shared memory of an H100."""
    if dtype is torch.float32:  # no tensor cores: products go through registers
        return TileShape(32, 32, 4, 3) if head_dim <= 128 else TileShape(16, 16, 4, 3)
    if head_dim > 128:
        return TileShape(pairs, 32, 8, 5)
    if head_dim > 64 and pairs == 128:
        return TileShape(128, 128, 8, 5)
    return TileShape(pairs, 64, 4, 5)


def tiles_for(counts: Sequence[int], starts: Sequence[int], group: int, pairs: int) -> NDArray[np.int32]:
    """``[N, 2]``: (row, tile of its pairs), those with the most keys first, of rows that feed ``counts`` tokens behind
    ``starts`` cached ones; N is at most ``sum(counts) * group // pairs + len(counts)``."""
    numbers = np.asarray(counts, dtype=np.int64) * group
    tiles = -(-numbers // pairs)
    row = np.repeat(np.arange(len(tiles)), tiles)
    tile = np.arange(len(row)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    keys = np.asarray(starts, dtype=np.int64)[row] + np.minimum((tile + 1) * pairs, numbers[row]) // group
    order = np.argsort(-keys, kind="stable")
    return np.stack([row, tile], 1)[order].astype(np.int32)


@triton.jit
def last_key(start, count, begin, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Behind the last key that any of the pairs from `begin` on sees."""
    return start + tl.minimum((begin + BLOCK_M - 1) // GROUP, count - 1) + 1


@triton.jit
def attend(
    q,
    cache,
    slots_at,
    first,
    start,
    count,
    begin,
    kv_head,
    first_key,
    end_key,
    q_stride,
    cache_stride,
    scale,
    lowest,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The pairs from `begin` on of a row over its keys from `first_key` to `end_key`, whole blocks unless that is the
    last one: each pair's line (token and head) of `out`, its highest score (`lowest` or more), its sum of weights and
    its weighted sum of values. `scale` is of base-2 exponents, above 0."""
    pair = begin + tl.arange(0, BLOCK_M)
    # Pairs behind the last one compute its token again.
    token = tl.minimum(pair // GROUP, count - 1)
    head = kv_head * GROUP + pair % GROUP
    line = first.to(tl.int64) + token
    column = tl.arange(0, D)
    query = tl.load(q + line[:, None] * q_stride + head[:, None] * D + column[None, :])
    position = start + token  # the last key that a pair sees
    keys = last_key(start, count, begin, GROUP, BLOCK_M)
    all_seen = start + begin // GROUP + 1  # keys that every pair sees

    keys_at = cache + kv_head * D + column[None, :]
    best = tl.full([BLOCK_M], lowest, tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    value = tl.zeros([BLOCK_M, D], tl.float32)
    for block in range(first_key, end_key, BLOCK_N):
        key = block + tl.arange(0, BLOCK_N)
        # Entries behind the last key are not the row's: the last key stands in for them, and no pair sees it there.
        slot = tl.load(slots_at + tl.minimum(key, keys - 1)).to(tl.int64)
        at = keys_at + slot[:, None] * cache_stride
        k = tl.load(at)
        v = tl.load(at + KV_HEADS * D)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee")
        if block + BLOCK_N > all_seen:
            scores = tl.where(key[None, :] <= position[:, None], scores, float("-inf"))
        highest = tl.maximum(best, tl.max(scores, 1) * scale)
        share = tl.exp2(scores * scale - highest[:, None])
        shrink = tl.exp2(best - highest)
        weight = weight * shrink + tl.sum(share, 1)
        value = tl.dot(share.to(v.dtype), v, value * shrink[:, None], input_precision="ieee")
        best = highest
    return line * KV_HEADS * GROUP + head, best, weight, value


@triton.jit(do_not_specialize_on_alignment=["tiles", "rows", "first", "counts", "starts"])
def _prefill(
    q,
    cache,
    table,
    tiles,
    rows,
    first,
    counts,
    starts,
    out,
    q_stride,
    cache_stride,
    table_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile is computed in `PARTS` programs."""
    kv_head = tl.program_id(0)
    tile = tiles + (tl.program_id(1) // PARTS) * 2
    index = tl.load(tile)
    begin = (tl.load(tile + 1) * PARTS + tl.program_id(1) % PARTS) * BLOCK_M
    count = tl.load(counts + index)
    if begin < count * GROUP:
        start = tl.load(starts + index)
        line, _, weight, value = attend(
            q,
            cache,
            table + tl.load(rows + index).to(tl.int64) * table_stride,
            tl.load(first + index),
            start,
            count,
            begin,
            kv_head,
            0,
            last_key(start, count, begin, GROUP, BLOCK_M),
            q_stride,
            cache_stride,
            scale,
            float("-inf"),
            KV_HEADS,
            GROUP,
            D,
            BLOCK_M,
            BLOCK_N,
        )
        value = value / weight[:, None]
        ours = begin + tl.arange(0, BLOCK_M) < count * GROUP
        out_at = out + line[:, None] * D + tl.arange(0, D)[None, :]
        tl.store(out_at, value.to(out.dtype.element_ty), mask=ours[:, None])


def prefill_attention(
    q: Tensor,
    cache: Tensor,
    table: Tensor,
    tiles: Tensor,
    rows: Tensor,
    first: Tensor,
    counts: Tensor,
    starts: Tensor,
    scale: float,
    out: Tensor,
    *,
    pairs: int,
    shape: TileShape | None = None,
) -> None:
    """``q [T, H, D]`` (tokens may lie apart) -> the same tokens of ``out [T, H, D]`` contiguous.

    Row r feeds ``counts[r]`` tokens, packed in q from ``first[r]`` on, behind ``starts[r]`` cached ones. The keys and
    values of all of them are in ``cache [S, 2K, D]``, at the slots ``table[rows[r]]``. All indices are int32; D is a
    power of two from 16 on. `tiles` comes from `tiles_for`, with `pairs`; one of a row without tokens is passed over.
    """
    _, heads, dim = q.shape
    kv_heads = cache.shape[1] // 2
    group = heads // kv_heads
    block_m, block_n, warps, stages = shape or tile_shape(q.dtype, dim, pairs)
    parts = pairs // block_m
    _prefill[(kv_heads, len(tiles) * parts)](
        q,
        cache,
        table,
        tiles,
        rows,
        first,
        counts,
        starts,
        out,
        q.stride(0),
        cache.stride(0),
        table.stride(0),
        scale * LOG2_E,
        KV_HEADS=kv_heads,
        GROUP=group,
        D=dim,
        PARTS=parts,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )
