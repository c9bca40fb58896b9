"""One tile of prefill attention: a run of (token, query head) pairs that share a key/value head, over a range of keys
(FlashAttention-2, Dao 2023). Meaning: `reference.attention`.

The heads of a token lie side by side in a tile, so that keys and values are read once for all of them.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from lightllmd.kernels.activation import soft_capped
from lightllmd.kernels.attention_kind import Operands, first_seen
from lightllmd.kernels.kv_access import load_keys, load_scales, load_values


@triton.jit
def tile_at(tiles, counts, starts, part, PARTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of the part number `part` of all tiles, which have `PARTS` each: its row, the first of its pairs, and how many
    tokens the row feeds behind how many."""
    tile = tiles + (part // PARTS) * 2
    row = tl.load(tile)
    return row, (tl.load(tile + 1) * PARTS + part % PARTS) * BLOCK_M, tl.load(counts + row), tl.load(starts + row)


@triton.jit
def keys_of(runs, first, start, count, begin, SHAPE: tl.constexpr, BLOCK_M: tl.constexpr):
    """The range of keys that any of the pairs from `begin` on sees. What a token sees ends nowhere before what an
    earlier one sees."""
    earliest, last = begin // SHAPE.GROUP, tl.minimum((begin + BLOCK_M - 1) // SHAPE.GROUP, count - 1)
    low, end = first_seen(start + earliest, SHAPE.WINDOW), start + last + 1
    if runs is not None:
        end = tl.load(runs + first + last)
    return low, end


@triton.jit
def attend(
    on: Operands,
    runs,
    row,
    first,
    start,
    count,
    begin,
    kv_head,
    first_key,
    end_key,
    SHAPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOWEST: tl.constexpr,
):
    """The pairs from `begin` on of a row over its keys from `first_key` to `end_key`, whole blocks unless that is the
    last one: each pair's line (token and head) of `out`, its highest score (`LOWEST` or more), its sum of weights and
    its weighted sum of values. The scale of scores is above 0. `LOWEST` is finite where a pair may see nothing of a
    block: without a score it has no weight and no value. `runs`: `PrefillTiles.bidirectional`."""
    D: tl.constexpr = SHAPE.D
    pair = begin + tl.arange(0, BLOCK_M)
    # Pairs behind the last one compute its token again.
    token = tl.minimum(pair // SHAPE.GROUP, count - 1)
    head = kv_head * SHAPE.GROUP + pair % SHAPE.GROUP
    line = first.to(tl.int64) + token
    query = tl.load(on.q + line[:, None] * on.q_stride + head[:, None] * D + tl.arange(0, D)[None, :])
    position = start + token
    last = position  # the last key that a pair sees
    _, keys = keys_of(runs, first, start, count, begin, SHAPE, BLOCK_M)
    all_seen = start + begin // SHAPE.GROUP + 1  # keys that every pair sees
    hidden = first_seen(start + tl.minimum((begin + BLOCK_M - 1) // SHAPE.GROUP, count - 1), SHAPE.WINDOW)
    if runs is not None:
        last = tl.load(runs + line) - 1
        all_seen = tl.load(runs + first + begin // SHAPE.GROUP)
    slots_at = on.table + row.to(tl.int64) * on.table_stride

    best = tl.full([BLOCK_M], LOWEST, tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    value = tl.zeros([BLOCK_M, D], tl.float32)
    for block in range(first_key, end_key, BLOCK_N):
        key = block + tl.arange(0, BLOCK_N)
        # Entries behind the last key are not the row's: the last key stands in for them, and no pair sees it there.
        slot = tl.load(slots_at + tl.minimum(key, keys - 1)).to(tl.int64)
        k = load_keys(on.cache, kv_head, slot, None, query.dtype, SHAPE)
        v = load_values(on.cache, kv_head, slot, None, query.dtype, SHAPE)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee")
        if SHAPE.KV.FOLDED:
            key_scale, value_scale = load_scales(on.cache, kv_head, slot, None, SHAPE)
            scores *= key_scale[None, :]
        scale = on.scale
        if SHAPE.SOFT_CAP > 0:
            scores, scale = soft_capped(scores * scale, SHAPE.SOFT_CAP), 1.0
        if block + BLOCK_N > all_seen:
            scores = tl.where(key[None, :] <= last[:, None], scores, float("-inf"))
        if SHAPE.WINDOW:
            if block < hidden:
                scores = tl.where(key[None, :] > position[:, None] - SHAPE.WINDOW, scores, float("-inf"))
        highest = tl.maximum(best, tl.max(scores, 1) * scale)
        share = tl.exp2(scores * scale - highest[:, None])
        shrink = tl.exp2(best - highest)
        weight = weight * shrink + tl.sum(share, 1)
        if SHAPE.KV.FOLDED:
            share *= value_scale[None, :]
        value = tl.dot(share.to(v.dtype), v, value * shrink[:, None], input_precision="ieee")
        best = highest
    if SHAPE.KV.FOLDED:
        value *= 1.0 / SHAPE.KV.LIFT
    return line * (SHAPE.KV_HEADS * SHAPE.GROUP) + head, best, weight, value
