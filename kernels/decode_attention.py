"""Attention of one new token per row over its cached keys and values, split along the sequence (Flash-Decoding, Dao et
al. 2023). Meaning: `reference.attention`.

A program reads one segment of one row and key/value head. The query heads of that head's group are the rows of its
matrix products, so that keys and values are read once for all of them. How many segments there are is fixed by the
launch; how long they are follows from the row's length, which only the device knows. Programs that a row does not need
leave at once: a row of one filled segment is written directly, others are merged by their log-sum-exps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllmd.kernels.segments import chunk, merge_lines

LOG2_E = 1.4426950408889634


class DecodeTiles(NamedTuple):
    block_n: int  # tokens that a program reads at a time
    warps: int
    stages: int  # slots go two iterations ahead of keys and values, those two ahead of the products: 5


def decode_tiles(dtype: torch.dtype, head_dim: int) -> DecodeTiles:
    """Small tiles, several in flight: measured on an H100, 32 tokens were as fast as any or faster everywhere."""
    keys = 8192  # bytes per tile
    return DecodeTiles(max(16, min(64, keys // (head_dim * dtype.itemsize))), warps=4, stages=5)


def segments_for(batch: int, kv_heads: int, width: int, multiprocessors: int = 132) -> int:
    """How many programs share a row and key/value head: one or two programs per multiprocessor in all, as long as there
    are fewer of both; a power of two up to 64. More would have less to read than it takes to begin.

    `width` is the most tokens that a row can have.
    """
    most = min(64, 2 * multiprocessors // (batch * kv_heads), triton.cdiv(width, 32))
    return 1 << max(0, most.bit_length() - 1)


@triton.jit(do_not_specialize_on_alignment=["rows", "positions"])
def _decode(
    q,
    cache,
    table,
    rows,
    positions,
    out,
    partial,
    arrived,
    q_stride,
    cache_stride,
    table_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    COUNT: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
    MERGE: tl.constexpr,
):
    """`COUNT` query heads per program, of the model's `GROUP` per key/value head; `scale` is of base-2 exponents."""
    batch = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(2)
    length = tl.load(positions + batch) + 1
    row = tl.load(rows + batch).to(tl.int64)
    span = tl.cdiv(tl.cdiv(length, SEGMENTS), BLOCK_N) * BLOCK_N
    first = segment * span
    last = tl.minimum(first + span, length)
    if (segment == 0) | (first < last):
        first_head = tl.program_id(1) * COUNT
        lane = tl.arange(0, M)
        ours = lane < COUNT
        column = tl.arange(0, D)
        q_at = q + batch * q_stride + (first_head + lane)[:, None] * D + column[None, :]
        query = tl.load(q_at, mask=ours[:, None], other=0.0)
        slots_at = table + row * table_stride
        keys_at = cache + first_head // GROUP * D + column[None, :]

        best = tl.full([M], float("-inf"), tl.float32)
        # Kept apart by column and summed at the end: a sum across warps is a barrier.
        weight = tl.zeros([M, BLOCK_N], tl.float32)
        value = tl.zeros([M, D], tl.float32)
        for begin in range(first, last, BLOCK_N):
            token = begin + tl.arange(0, BLOCK_N)
            inside = token < last
            slot = tl.load(slots_at + token, mask=inside, other=0).to(tl.int64)
            at = keys_at + slot[:, None] * cache_stride
            keys = tl.load(at, mask=inside[:, None], other=0.0)
            values = tl.load(at + KV_HEADS * D, mask=inside[:, None], other=0.0)
            scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
            scores = tl.where(inside[None, :], scores, float("-inf"))
            highest = tl.maximum(best, tl.max(scores, 1))
            share = tl.exp2(scores - highest[:, None])
            shrink = tl.exp2(best - highest)
            weight = weight * shrink[:, None] + share
            value = tl.dot(share.to(values.dtype), values, value * shrink[:, None], input_precision="ieee")
            best = highest
        total = tl.sum(weight, 1)
        value = value / tl.where(total > 0, total, 1.0)[:, None]  # a row of no tokens: zeros

        first_line = batch * tl.num_programs(1) * COUNT + first_head
        line = first_line + lane
        if SEGMENTS == 1 or span >= length:
            tl.store(out + line[:, None] * D + column[None, :], value.to(out.dtype.element_ty), mask=ours[:, None])
        else:
            lines = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * COUNT
            logs = partial + lines * SEGMENTS * D
            entry = line * SEGMENTS + segment
            tl.store(partial + entry[:, None] * D + column[None, :], value, mask=ours[:, None])
            tl.store(logs + entry, best + tl.log2(total), mask=ours)
            if MERGE:
                # One thread counts. Its release covers what the others wrote before the barrier, its acquire what
                # they read after it, since the counter's value reaches them through a barrier too.
                tl.debug_barrier()
                counter = arrived + batch * tl.num_programs(1) + tl.program_id(1)
                used = tl.cdiv(length, span)
                if tl.atomic_add(counter, 1, sem="acq_rel") == used - 1:
                    tl.store(counter, 0)  # as the next launch expects it
                    few = tl.arange(0, PADDED)
                    merge_lines(partial, logs, out, first_line + few, few < COUNT, used, D, SEGMENTS, CHUNK)


@triton.jit(do_not_specialize_on_alignment=["positions"])
def _merge(
    positions,
    partial,
    out,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One row and head per program."""
    batch = tl.program_id(0).to(tl.int64)
    length = tl.load(positions + batch) + 1
    span = tl.cdiv(tl.cdiv(length, SEGMENTS), BLOCK_N) * BLOCK_N
    if span < length:
        lines = tl.num_programs(0).to(tl.int64) * HEADS
        logs = partial + lines * SEGMENTS * D
        one = tl.arange(0, 1)
        line = batch * HEADS + tl.program_id(1) + one
        merge_lines(partial, logs, out, line, one < 1, tl.cdiv(length, span), D, SEGMENTS, CHUNK)


def decode_attention(
    q: Tensor,
    cache: Tensor,
    table: Tensor,
    rows: Tensor,
    positions: Tensor,
    scale: float,
    out: Tensor,
    partial: Tensor | None = None,
    *,
    segments: int = 1,
    packed: bool = True,
    arrived: Tensor | None = None,
    tiles: DecodeTiles | None = None,
) -> None:
    """``q [B, H, D]`` (tokens may lie apart) -> ``out [B, H, D]`` contiguous. B >= 1, D a power of two from 16 on.

    ``cache [S, 2K, D]``, ``table [R, W]`` int32 slots; row b is ``table[rows[b]]`` and has ``positions[b] + 1`` tokens,
    none of them gives zeros. With `packed` the heads of a group share a program, otherwise each has its own.
    `segments` is a power of two; above 1 `partial` is needed: fp32, contiguous, `workspace_size` or more, whatever
    they hold. With `arrived`, int32 zeros, B * H or more, the program that ends last merges the segments, and leaves
    zeros; without it that is a second launch.
    """
    batch, heads, dim = q.shape
    kv_heads = cache.shape[1] // 2
    group = heads // kv_heads
    block_n, warps, stages = tiles or decode_tiles(q.dtype, dim)
    count = group if packed else 1
    padded = triton.next_power_of_2(count)
    _decode[(batch, heads // count, segments)](
        q,
        cache,
        table,
        rows,
        positions,
        out,
        partial,
        arrived,
        q.stride(0),
        cache.stride(0),
        table.stride(0),
        scale * LOG2_E,
        KV_HEADS=kv_heads,
        GROUP=group,
        COUNT=count,
        PADDED=padded,
        D=dim,
        M=max(16, padded),
        BLOCK_N=block_n,
        SEGMENTS=segments,
        CHUNK=chunk(segments, padded, dim),
        MERGE=arrived is not None,
        num_warps=warps,
        num_stages=stages,
    )
    if segments > 1 and arrived is None:
        _merge[(batch, heads)](
            positions,
            partial,
            out,
            HEADS=heads,
            D=dim,
            BLOCK_N=block_n,
            SEGMENTS=segments,
            CHUNK=chunk(segments, 1, dim),
        )
