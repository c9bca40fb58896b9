"""Partial results of attention over segments of keys, and how they become one (Flash-Decoding, Dao et al. 2023).

A line is what one query head of one token attends to. Its segments lie side by side: ``[lines, segments, D]`` values,
each a weighted mean over the keys of its segment, and behind them ``[lines, segments]`` logarithms to the base 2 of
the sums of their weights. All of it is fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

MERGED_AT_ONCE = 8192  # numbers of partial results that a program holds in registers


def workspace_size(tokens: int, heads: int, head_dim: int, segments: int) -> int:
    """fp32 numbers of the partial results of all heads of so many tokens."""
    return tokens * heads * segments * (head_dim + 1) if segments > 1 else 0


def chunk(segments: int, lines: int, dim: int) -> int:
    """How many segments of `lines` are merged at a time: the `CHUNK` of `merge_lines`."""
    return max(1, min(segments, MERGED_AT_ONCE // (lines * dim)))


@triton.jit
def merge_lines(
    values,
    logs,
    out,
    line,
    ours,
    used,
    D: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """`out` of the lines ``line [L]`` where `ours`, out of their first `used` segments; the other segments were never
    written. The order is that of the segments, whoever came last."""
    column = tl.arange(0, D)
    # Past the first-level cache: other multiprocessors wrote all this, maybe in the same launch.
    every = tl.arange(0, SEGMENTS)
    all_logs = tl.load(
        logs + line[:, None] * SEGMENTS + every[None, :],
        mask=ours[:, None] & (every < used)[None, :],
        other=float("-inf"),
        cache_modifier=".cg",
    )
    best = tl.where(ours, tl.max(all_logs, 1), 0.0)
    total = tl.sum(tl.exp2(all_logs - best[:, None]), 1)
    merged = tl.zeros([line.shape[0], D], tl.float32)
    for base in range(0, used, CHUNK):
        segment = base + tl.arange(0, CHUNK)
        entry = line[:, None] * SEGMENTS + segment[None, :]
        inside = ours[:, None] & (segment < used)[None, :]
        log = tl.load(logs + entry, mask=inside, other=float("-inf"), cache_modifier=".cg")
        value_at = values + entry[:, :, None] * D + column[None, None, :]
        value = tl.load(value_at, mask=inside[:, :, None], other=0.0, cache_modifier=".cg")
        merged += tl.sum(value * tl.exp2(log - best[:, None])[:, :, None], 1)
    merged = merged / tl.where(ours, total, 1.0)[:, None]
    tl.store(out + line[:, None] * D + column[None, :], merged.to(out.dtype.element_ty), mask=ours[:, None])
