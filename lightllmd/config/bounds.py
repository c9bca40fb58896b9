"""Bounds on a step's workspace: the engine keeps to them, so that what the budget plans with them is what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, takewhile

from lightllmd.config.parameters import Config, Params

SPARE_WIDTH = 8  # entries of the request table beyond the longest request

POOLED_ROWS = 512  # hidden states that become vectors at a time

# --- on a CPU
LOGIT_ROWS = 64  # rows whose fp32 logits exist at a time, however many rows a step has
# Decode rows are read together, padded to at most this many times what they hold; rows of up to SHORT_ROW tokens are
# never parted, whatever that pads.
GATHER_PADDING = 2
SHORT_ROW = 128
MASK_ROWS = 512  # tokens behind a cached prefix that attend at a time: their mask is as wide as the sequence

# --- on a GPU
DEVICE_HEAD_DIMS = (16, 32, 64, 128, 256)  # elements of a head that the kernels are made for
DEVICE_LOGIT_ROWS = 512  # as LOGIT_ROWS: enough for a product at full speed
PREFILL_SIZES = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)  # tokens
FEW_ROWS = 4  # up to so many rows products have a kernel for each number
PREFILL_ROWS = 64  # the most prompts that one padded step computes, and splitfuse_mode beside decode rows
MIXED_STEP = 32  # decode rows are padded to multiples of it beside a block of a prompt, which costs much more
SCORED_ROWS = 128  # prompt tokens whose logits exist at a time, at least
MOST_SEGMENTS = 64  # parts that decode attention cuts a row into
MULTIPROCESSORS = 132
# Programs of one decode attention that cuts rows into parts.
MOST_PROGRAMS = 2 * MULTIPROCESSORS
# Parts of all (token, query head) pairs together in a prefill attention that cuts the keys of its tiles into segments:
# a multiprocessor each, for 128 pairs.
SPLIT_LINES = MULTIPROCESSORS * 128
GRAPH_TILES = 8  # of the largest CUDA graph of a vision tower; more tiles keep the device busy by themselves


def batch_sizes(most: int) -> list[int]:
    """The row counts that decode steps are padded to, ascending; the last one is `most`."""
    return [*takewhile(lambda size: size < most, _sizes()), most]


def _sizes() -> Iterator[int]:
    """1, 2, 4, then steps that stay near an eighth of the size: 8 up to 64, 16 up to 128, …, and 256 from 1024 on."""
    yield from (1, 2, 4)
    size, step = 8, 8
    while True:
        yield size
        if size >= 8 * step and step < 256:
            step = min(2 * step, 256)
        size += step


def graph_sizes(config: Config) -> list[int]:
    """Those of `batch_sizes` that are captured as CUDA graphs."""
    engine, most = config.engine, config.params.running_max_req_size
    if not engine.cuda_graphs:
        return []
    return [size for size in batch_sizes(most) if size <= (engine.graph_max_rows or most)]


def prefill_sizes(batch_max_tokens: int) -> list[int]:
    """The token counts that short prefills are padded to, and captured at: launches cost more than they compute."""
    return [size for size in PREFILL_SIZES if size <= batch_max_tokens]


def prefill_budget(block: int, decode_rows: int) -> int:
    """The most prompt tokens that a step of splitfuse_mode computes beside `decode_rows` rows, in one step for all row
    counts that are padded to the same multiple of MIXED_STEP.

    The block has room for the padded rows as long as half of it is left (`least_prefill_budget`): a matmul of a few
    rows more than a block is much slower.
    """
    return max(least_prefill_budget(block), block - MIXED_STEP * -(-decode_rows // MIXED_STEP))


def least_prefill_budget(block: int) -> int:
    """`prefill_budget` beside any number of decode rows."""
    return block - block // 2


def mixed_shapes(params: Params) -> list[tuple[int, int]]:
    """What decode rows, and prompt tokens beside them, are padded to, and such steps captured at, by ascending rows;
    none without splitfuse_mode, or where a block is so large that launches cost less than it computes.

    A step with ``prefill_budget(block, rows)`` prompt tokens fits the first shape that has room for its rows.
    """
    block, most = params.splitfuse_block_size, params.running_max_req_size
    if not params.splitfuse_mode or block > PREFILL_SIZES[-1]:
        return []
    sizes = [size for size in batch_sizes(most) if size % MIXED_STEP == 0 or size == most]
    return [(size, prefill_budget(block, fewer + 1)) for fewer, size in pairwise([0, *sizes])]


def most_step_tokens(batch_max_tokens: int, running: int) -> int:
    """The most tokens that a step computes, padding included: a full prefill, and all other rows beside it."""
    return batch_max_tokens + running


def scored_rows(running: int) -> int:
    """The prompt tokens whose logits exist at a time; rows that are sampled are fewer at a time or as many."""
    return min(DEVICE_LOGIT_ROWS, max(SCORED_ROWS, running + 1))


def decode_parts(most: int, kv_heads: int) -> int:
    """Segments of all rows together in a decode attention of up to `most` rows, at the worst row count."""
    return max(most, min(MOST_SEGMENTS * most, MOST_PROGRAMS // kv_heads))
