"""Attention of one new token per row over its cached keys and values, split along the sequence (Flash-Decoding, Dao et
al. 2023). Meaning: `reference.attention`.

A program reads one segment of one row and key/value head. The query heads of that head's group are the rows of its
matrix products, so that keys and values are read once for all of them. How many segments there are is fixed by the
launch; how long they are follows from the row's length, which only the device knows. Programs that a row does not need
leave at once: a row of one filled segment is written directly, others are merged by their log-sum-exps.
"""

# mypy: allow-untyped-defs, disable-error-code="union-attr"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllmd.kernels.activation import soft_capped
from lightllmd.kernels.attention_kind import (
    Operands,
    attention_shape,
    first_seen,
    operands,
    store_lines,
)
from lightllmd.kernels.kv_access import even_of, load_keys, load_pairs, load_scales, load_values, odd_of
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.layout import Heads
from lightllmd.kernels.segments import Partial, chunk, last_to_arrive, merge_lines, segment_length, store_segment


class DecodeTiles(NamedTuple):
    """How a program goes through its keys."""

    block_n: int  # tokens that a program reads at a time
    warps: int
    stages: int  # slots go two iterations ahead of keys and values, those two ahead of the products: 5


def decode_tiles(dtype: torch.dtype, head_dim: int) -> DecodeTiles:
    """Of elements of such a dtype, where they are loaded as they are stored, else of that of queries. Small tiles,
    several in flight: measured on an H100, 32 tokens of 16 bits were as fast as any or faster everywhere."""
    keys = 8192  # bytes per tile
    return DecodeTiles(max(16, min(64, keys // (head_dim * dtype.itemsize))), warps=4, stages=5)


def segments_for(batch: int, kv_heads: int, width: int, multiprocessors: int = 132) -> int:
    """How many programs share a row and key/value head: one or two programs per multiprocessor in all, as long as there
    are fewer of both; a power of two up to 64. More would have less to read than it takes to begin.

    `width` is the most tokens that are read of a row.
    """
    most = min(64, 2 * multiprocessors // (batch * kv_heads), triton.cdiv(width, 32))
    return 1 << max(0, most.bit_length() - 1)


@triton.jit(do_not_specialize_on_alignment=["rows", "positions"])
def _decode(
    on: Operands,
    rows,
    positions,
    partial,
    SHAPE: tl.constexpr,
    COUNT: tl.constexpr,
    PADDED: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`COUNT` query heads per program, of the model's `GROUP` per key/value head."""
    D: tl.constexpr = SHAPE.D
    batch = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(2)
    position = tl.load(positions + batch)
    row = tl.load(rows + batch).to(tl.int64)
    start, length = first_seen(position, SHAPE.WINDOW), position + 1
    span = segment_length(length - start, SEGMENTS, BLOCK_N)
    first = start + segment * span
    last = tl.minimum(first + span, length)
    if (segment == 0) | (first < last):
        first_head = tl.program_id(1) * COUNT
        lane = tl.arange(0, M)
        ours = lane < COUNT
        q_at = on.q + batch * on.q_stride + (first_head + lane)[:, None] * D + tl.arange(0, D)[None, :]
        if SHAPE.KV.PAIRED:
            TYPE: tl.constexpr = tl.float32 if on.q.dtype.element_ty == tl.float32 else tl.float16
            q_at = on.q + batch * on.q_stride + (first_head + lane)[:, None] * D + 2 * tl.arange(0, D // 2)[None, :]
            query = tl.load(q_at, mask=ours[:, None], other=0.0).to(TYPE)
            odd_query = tl.load(q_at + 1, mask=ours[:, None], other=0.0).to(TYPE)
        else:
            query = tl.load(q_at, mask=ours[:, None], other=0.0)
        slots_at = on.table + row * on.table_stride
        kv_head = first_head // SHAPE.GROUP

        best = tl.full([M], float("-inf"), tl.float32)
        # Kept apart by column and summed at the end: a sum across warps is a barrier.
        weight = tl.zeros([M, BLOCK_N], tl.float32)
        value = tl.zeros([M, D // 2 if SHAPE.KV.PAIRED else D], tl.float32)
        if SHAPE.KV.PAIRED:
            odd_value = tl.zeros([M, D // 2], tl.float32)
        for begin in range(first, last, BLOCK_N):
            token = begin + tl.arange(0, BLOCK_N)
            inside = token < last
            slot = tl.load(slots_at + token, mask=inside, other=0).to(tl.int64)
            if SHAPE.KV.PAIRED:
                keys = load_pairs(on.cache, kv_head, slot, inside, SHAPE, 0)
                values = load_pairs(on.cache, kv_head, slot, inside, SHAPE, 1)
                scores = tl.dot(query, tl.trans(even_of(keys, SHAPE, TYPE)), input_precision="ieee")
                odd_keys = odd_of(keys, SHAPE, TYPE)
                scores = tl.dot(odd_query, tl.trans(odd_keys), scores, input_precision="ieee") * on.scale
            else:
                keys = load_keys(on.cache, kv_head, slot, inside, query.dtype, SHAPE)
                values = load_values(on.cache, kv_head, slot, inside, query.dtype, SHAPE)
                scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * on.scale
            if SHAPE.KV.FOLDED:
                key_scale, value_scale = load_scales(on.cache, kv_head, slot, inside, SHAPE)
                scores *= key_scale[None, :]
            scores = tl.where(inside[None, :], soft_capped(scores, SHAPE.SOFT_CAP), float("-inf"))
            highest = tl.maximum(best, tl.max(scores, 1))
            share = tl.exp2(scores - highest[:, None])
            shrink = tl.exp2(best - highest)
            weight = weight * shrink[:, None] + share
            if SHAPE.KV.FOLDED:
                share *= value_scale[None, :]
            if SHAPE.KV.PAIRED:
                share = share.to(TYPE)
                even, odd = even_of(values, SHAPE, TYPE), odd_of(values, SHAPE, TYPE)
                value = tl.dot(share, even, value * shrink[:, None], input_precision="ieee")
                odd_value = tl.dot(share, odd, odd_value * shrink[:, None], input_precision="ieee")
            else:
                value = tl.dot(share.to(values.dtype), values, value * shrink[:, None], input_precision="ieee")
            best = highest
        total = tl.sum(weight, 1)
        divisor = tl.where(total > 0, total, 1.0)  # a row of no tokens: zeros
        if SHAPE.KV.FOLDED:
            divisor *= SHAPE.KV.LIFT / SHAPE.KV.UNIT
        if SHAPE.KV.PAIRED:
            value = tl.join(value, odd_value).reshape(M, D)
        value = value / divisor[:, None]

        first_line = batch * tl.num_programs(1) * COUNT + first_head
        if SEGMENTS == 1 or span >= length - start:
            store_lines(on.out, first_line + lane, ours, value, D)
        else:
            store_segment(partial, first_line + lane, ours, segment, value, best + tl.log2(total), D, SEGMENTS)
            if partial.arrived is not None:
                used = tl.cdiv(length - start, span)
                if last_to_arrive(partial.arrived + batch * tl.num_programs(1) + tl.program_id(1), used):
                    few = tl.arange(0, PADDED)
                    merge_lines(partial, on.out, first_line + few, few < COUNT, used, D, SEGMENTS, CHUNK)


@triton.jit(do_not_specialize_on_alignment=["positions"])
def _merge(
    on: Operands,
    positions,
    partial: Partial,
    SHAPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One row and head per program."""
    batch = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + batch)
    keys = position + 1 - first_seen(position, SHAPE.WINDOW)
    span = segment_length(keys, SEGMENTS, BLOCK_N)
    if span < keys:
        one = tl.arange(0, 1)
        line = batch * tl.num_programs(1) + tl.program_id(1) + one
        merge_lines(partial, on.out, line, one < 1, tl.cdiv(keys, span), SHAPE.D, SEGMENTS, CHUNK)


def decode_attention(
    q: Tensor,
    cache: LayerCache,
    heads: Heads,
    table: Tensor,
    rows: Tensor,
    positions: Tensor,
    out: Tensor,
    partial: Partial | None = None,
    *,
    segments: int = 1,
    packed: bool = True,
    tiles: DecodeTiles | None = None,
) -> None:
    """``q [B, H, D]`` (tokens may lie apart) -> ``out [B, H, D]`` contiguous. B >= 1, D a power of two from 16 on.

    ``table [R, W]`` int32 slots; row b is ``table[rows[b]]`` and has ``positions[b] + 1`` tokens, none of them gives
    zeros. With `packed` the heads of a group share a program, otherwise each has its own. `segments` is a power of two;
    above 1 there must be `partial` results. If these count, with B * H counters or more, the program that ends last
    merges the segments; else a second launch does.
    """
    count = heads.query // heads.kv if packed else 1
    padded = triton.next_power_of_2(count)
    on, shape = operands(q, cache, heads, table, out, paired=True), attention_shape(q, cache, heads, paired=True)
    block_n, warps, stages = tiles or decode_tiles(torch.int8 if shape.KV.PAIRED else q.dtype, heads.dim)
    if cache.scheme.packed == 2:
        block_n = max(32, block_n)  # Triton 3.6 multiplies fewer wrongly, once they are joined of two halves
    _decode[(len(q), heads.query // count, segments)](
        on,
        rows,
        positions,
        partial,
        SHAPE=shape,
        COUNT=count,
        PADDED=padded,
        M=max(16, padded),
        BLOCK_N=block_n,
        SEGMENTS=segments,
        CHUNK=chunk(segments, padded, heads.dim),
        num_warps=warps,
        num_stages=stages,
    )
    if partial is not None and partial.arrived is None:
        once = chunk(segments, 1, heads.dim)
        _merge[(len(q), heads.query)](
            on, positions, partial, SHAPE=shape, BLOCK_N=block_n, SEGMENTS=segments, CHUNK=once
        )
