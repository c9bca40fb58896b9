"""Partial results of attention over segments of keys, and how they become one (Flash-Decoding, Dao et al. 2023).

A line is what one query head of one token attends to. The programs that share it read a segment of its keys each; the
last of them to end merges what all have found, or a second launch does.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllmd.kernels.attention_kind import store_lines

MERGED_AT_ONCE = 8192  # elements of partial results that a program holds in registers


class Partial(NamedTuple):
    """Where the segments of all lines meet, as one argument of a kernel."""

    means: Tensor  # fp32 [lines, segments, D]: the mean of a segment's values by their weights
    logs: Tensor  # fp32 [lines, segments]: the base-2 logarithm of the sum of these weights
    arrived: Tensor | None  # int32 zeros, as each launch leaves them: counts the programs that have ended


def partial_results(out: Tensor, segments: int, arrived: Tensor | None) -> Partial | None:
    """For the lines of ``out [T, H, D]``; None where a line is one segment."""
    if segments == 1:
        return None
    tokens, heads, dim = out.shape
    means = out.new_empty((tokens * heads, segments, dim), dtype=torch.float32)
    return Partial(means, out.new_empty((tokens * heads, segments), dtype=torch.float32), arrived)


def workspace_size(tokens: int, heads: int, head_dim: int, segments: int) -> int:
    """fp32 elements of `partial_results`."""
    return tokens * heads * segments * (head_dim + 1) if segments > 1 else 0


def chunk(segments: int, lines: int, dim: int) -> int:
    """How many segments of `lines` are merged at a time: the `CHUNK` of `merge_lines`."""
    return max(1, min(segments, MERGED_AT_ONCE // (lines * dim)))


@triton.jit
def segment_length(keys, SEGMENTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many of a line's `keys` each segment has but the last one that has any: whole blocks of `BLOCK_N`."""
    return tl.cdiv(tl.cdiv(keys, SEGMENTS), BLOCK_N) * BLOCK_N


@triton.jit
def store_segment(partial, line, ours, segment, value, log, D: tl.constexpr, SEGMENTS: tl.constexpr):
    """``value [L, D]`` and ``log [L]`` of a segment of the lines ``line [L]`` where `ours`."""
    entry = line * SEGMENTS + segment
    tl.store(partial.means + entry[:, None] * D + tl.arange(0, D)[None, :], value, mask=ours[:, None])
    tl.store(partial.logs + entry, log, mask=ours)


@triton.jit
def last_to_arrive(counter, programs):
    """Whether this is the last of so many programs to call it; all that they stored before is visible then.

    One thread counts. Its release covers what the others wrote before the barrier, its acquire what they read after
    it, since the counter's value reaches them through a barrier too.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter, 0)  # as the next launch expects it
    return last


@triton.jit
def merge_lines(partial, out, line, ours, used, D: tl.constexpr, SEGMENTS: tl.constexpr, CHUNK: tl.constexpr):
    """`out` of the lines ``line [L]`` where `ours`, out of their first `used` segments; the other segments were never
    written. The order is that of the segments, whichever came last."""
    column = tl.arange(0, D)
    # Past the first-level cache: other multiprocessors wrote all this, maybe in the same launch.
    every = tl.arange(0, SEGMENTS)
    all_logs = tl.load(
        partial.logs + line[:, None] * SEGMENTS + every[None, :],
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
        log = tl.load(partial.logs + entry, mask=inside, other=float("-inf"), cache_modifier=".cg")
        value_at = partial.means + entry[:, :, None] * D + column[None, None, :]
        value = tl.load(value_at, mask=inside[:, :, None], other=0.0, cache_modifier=".cg")
        merged += tl.sum(value * tl.exp2(log - best[:, None])[:, :, None], 1)
    store_lines(out, line, ours, merged / tl.where(ours, total, 1.0)[:, None], D)
