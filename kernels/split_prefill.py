"""`prefill_attention` of few tokens behind long pasts: what a block of a prompt is, beside rows that go on.

Such a step has so few tiles that most of the device would idle while each tile reads all of its past. So several
programs share a tile of most pairs, each with a segment of the keys that the tile sees; the last of them to end merges
what all of them found, in the order of the segments.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightllmd.kernels.attention_kind import Operands, attention_shape, operands, store_lines
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.layout import Heads, PrefillTiles
from lightllmd.kernels.prefill_attention import TileShape, tile_shape
from lightllmd.kernels.prefill_tile import attend, keys_of, tile_at
from lightllmd.kernels.segments import Partial, last_to_arrive, merge_lines, segment_length, store_segment

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


@triton.jit(do_not_specialize_on_alignment=["tiles", "number", "rows", "first", "counts", "starts", "runs"])
def _split_prefill(
    on: Operands,
    tiles,
    rows,
    first,
    counts,
    starts,
    runs,
    number,
    partial: Partial,
    SHAPE: tl.constexpr,
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
        index, begin, count, start = tile_at(tiles, counts, starts, part, PARTS, BLOCK_M)
        ahead = 0
        if runs is not None:
            ahead = tl.load(first + index)
        low, end = keys_of(runs, ahead, start, count, begin, SHAPE, BLOCK_M)
        span = segment_length(end - low, SEGMENTS, BLOCK_N)
        first_key = low + segment * span
        if (begin < count * SHAPE.GROUP) & (first_key < end):
            row, packed = tl.load(rows + index), tl.load(first + index)
            end_key = tl.minimum(first_key + span, end)
            # The highest score is finite: a pair may see nothing of a segment.
            line, best, weight, value = attend(
                on, runs, row, packed, start, count, begin, kv_head, first_key, end_key, SHAPE, BLOCK_M, BLOCK_N, -1e30
            )
            value = value / tl.where(weight == 0, 1.0, weight)[:, None]
            ours = begin + tl.arange(0, BLOCK_M) < count * SHAPE.GROUP
            if span >= end - low:
                store_lines(on.out, line, ours, value, SHAPE.D)
            else:
                store_segment(partial, line, ours, segment, value, best + tl.log2(weight), SHAPE.D, SEGMENTS)
                used = tl.cdiv(end - low, span)
                if last_to_arrive(partial.arrived + part * SHAPE.KV_HEADS + kv_head, used):
                    for some in range(begin, begin + BLOCK_M, MERGED):
                        pair = some + tl.arange(0, MERGED)
                        head = kv_head * SHAPE.GROUP + pair % SHAPE.GROUP
                        there = (packed + pair // SHAPE.GROUP) * (SHAPE.KV_HEADS * SHAPE.GROUP) + head
                        merge_lines(
                            partial, on.out, there, pair < count * SHAPE.GROUP, used, SHAPE.D, SEGMENTS, CHUNK=1
                        )


def split_prefill(
    q: Tensor,
    cache: LayerCache,
    heads: Heads,
    table: Tensor,
    rows: PrefillTiles,
    out: Tensor,
    partial: Partial,
    *,
    shape: TileShape | None = None,
) -> None:
    """`prefill_attention` of the first ``rows.number[0]`` tiles; `rows.segments` programs, a power of two from 2 on,
    share each. `partial` counts: one counter for each key/value head and `block_m` pairs of the tiles, or more."""
    block_m, block_n, warps, stages = shape or tile_shape(q.dtype, heads.dim, rows.pairs, not cache.scheme.dense)
    parts = rows.pairs // block_m
    tiles = triton.cdiv(len(q) * heads.query, heads.kv * rows.pairs)
    _split_prefill[(heads.kv, rows.segments, tiles * parts)](
        operands(q, cache, heads, table, out),
        *(rows.tiles, rows.rows, rows.first, rows.counts, rows.starts, rows.bidirectional, rows.number),
        partial,
        SHAPE=attention_shape(q, cache, heads),
        PARTS=parts,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SEGMENTS=rows.segments,
        MERGED=min(block_m, MERGED_BY_WARP * warps // heads.dim),
        num_warps=warps,
        num_stages=stages,
    )
