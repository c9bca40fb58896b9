"""`prefill_attention` of few tokens behind long pasts: what a block of a prompt is, beside rows that go on.

Such a step has so few tiles that most of the device would idle while each tile reads all of its past. So several
programs share a tile of most pairs, each with a segment of the keys that the tile sees; the last of them to end merges
what all of them found, in the order of the segments.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightllmd.kernels.prefill_attention import LOG2_E, TileShape, attend, last_key, tile_shape
from lightllmd.kernels.segments import merge_lines

PAIRS = 128  # (token, head) pairs of a tile
MOST_SEGMENTS = 8
FEWEST_KEYS = 256  # of a segment of the longest row
MERGED_BY_WARP = 1024  # numbers at a time: more of them spill registers


def segments_for(tokens: int, group: int, kv_heads: int, width: int, multiprocessors: int = 132) -> int:
    """How many programs share a tile in steps that feed up to `tokens`: about one program per multiprocessor in all, as
    long as there are fewer tiles; a power of two, 1 where splitting does not pay.

    `width` is the most tokens that a row can have.
    """
    tiles = triton.cdiv(tokens * group, PAIRS) * kv_heads
    most = min(MOST_SEGMENTS, multiprocessors // tiles, width // FEWEST_KEYS)
    return 1 << max(0, most.bit_length() - 1)


@triton.jit(do_not_specialize_on_alignment=["tiles", "number", "rows", "first", "counts", "starts"])
def _split_prefill(
    q,
    cache,
    table,
    tiles,
    number,
    rows,
    first,
    counts,
    starts,
    out,
    values,
    logs,
    arrived,
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
    SEGMENTS: tl.constexpr,
    MERGED: tl.constexpr,
):
    """A tile is computed in `PARTS`. Programs go on to further ones, since many rows of few tokens have more tiles than
    the tokens of one row; as programs of their own, all that there can be would cost more than those that there are."""
    kv_head, segment = tl.program_id(0), tl.program_id(1)
    for part in range(tl.program_id(2), tl.load(number) * PARTS, tl.num_programs(2)):
        tile = tiles + (part // PARTS) * 2
        index = tl.load(tile)
        begin = (tl.load(tile + 1) * PARTS + part % PARTS) * BLOCK_M
        count = tl.load(counts + index)
        start = tl.load(starts + index)
        keys = last_key(start, count, begin, GROUP, BLOCK_M)
        span = tl.cdiv(tl.cdiv(keys, SEGMENTS), BLOCK_N) * BLOCK_N
        first_key = segment * span
        if (begin < count * GROUP) & (first_key < keys):
            line, best, weight, value = attend(
                q,
                cache,
                table + tl.load(rows + index).to(tl.int64) * table_stride,
                tl.load(first + index),
                start,
                count,
                begin,
                kv_head,
                first_key,
                tl.minimum(first_key + span, keys),
                q_stride,
                cache_stride,
                scale,
                -1e30,  # finite: a pair may see nothing of a segment, and then has no weight and no value
                KV_HEADS,
                GROUP,
                D,
                BLOCK_M,
                BLOCK_N,
            )
            value = value / tl.where(weight == 0, 1.0, weight)[:, None]
            ours = begin + tl.arange(0, BLOCK_M) < count * GROUP
            column = tl.arange(0, D)
            if span >= keys:
                tl.store(out + line[:, None] * D + column[None, :], value.to(out.dtype.element_ty), mask=ours[:, None])
            else:
                entry = line * SEGMENTS + segment
                tl.store(values + entry[:, None] * D + column[None, :], value, mask=ours[:, None])
                tl.store(logs + entry, best + tl.log2(weight), mask=ours)
                # One thread counts: decode attention tells why that is enough.
                tl.debug_barrier()
                counter = arrived + part * KV_HEADS + kv_head
                used = tl.cdiv(keys, span)
                if tl.atomic_add(counter, 1, sem="acq_rel") == used - 1:
                    tl.store(counter, 0)  # as the next launch expects it
                    for piece in range(begin, begin + BLOCK_M, MERGED):
                        pair = piece + tl.arange(0, MERGED)
                        head = kv_head * GROUP + pair % GROUP
                        there = (tl.load(first + index) + pair // GROUP) * KV_HEADS * GROUP + head
                        merge_lines(values, logs, out, there, pair < count * GROUP, used, D, SEGMENTS, CHUNK=1)


def split_prefill(
    q: Tensor,
    cache: Tensor,
    table: Tensor,
    tiles: Tensor,
    number: Tensor,
    rows: Tensor,
    first: Tensor,
    counts: Tensor,
    starts: Tensor,
    scale: float,
    out: Tensor,
    partial: Tensor,
    arrived: Tensor,
    *,
    segments: int,
    pairs: int = PAIRS,
    shape: TileShape | None = None,
) -> None:
    """`prefill_attention` of the first ``number[0]`` of `tiles`; `segments` programs, a power of two from 2 on, share
    each.

    `partial`: fp32, contiguous, ``segments.workspace_size(T, H, D, segments)`` or more, whatever they hold. `arrived`:
    int32 zeros, one for each key/value head and `block_m` pairs of the tiles, or more; they are left zeros.
    """
    tokens, heads, dim = q.shape
    kv_heads = cache.shape[1] // 2
    group = heads // kv_heads
    block_m, block_n, warps, stages = shape or tile_shape(q.dtype, dim, pairs)
    parts = pairs // block_m
    values, logs = partial, partial[tokens * heads * segments * dim :]
    _split_prefill[(kv_heads, segments, triton.cdiv(tokens * group, pairs) * parts)](
        q,
        cache,
        table,
        tiles,
        number,
        rows,
        first,
        counts,
        starts,
        out,
        values,
        logs,
        arrived,
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
        SEGMENTS=segments,
        MERGED=min(block_m, MERGED_BY_WARP * warps // dim),
        num_warps=warps,
        num_stages=stages,
    )
