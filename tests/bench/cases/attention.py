"""Attention through the request->slot table: decode in GB/s of keys and values, prefill in TFLOP/s beside torch's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional
from cases.products import DTYPE, SHAPES, Shape
from cases.timing import Deadline, Report, copies_for, median_us, require_close
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightllmd.kernels.decode_attention import (
    DecodeTiles,
    decode_attention,
    decode_tiles,
    segments_for,
)
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.layout import Heads, PrefillTiles
from lightllmd.kernels.prefill_attention import pairs_per_tile, prefill_attention, tiles_for
from lightllmd.kernels.segments import partial_results

DECODE = ((1, 576), (8, 576), (32, 576), (128, 576), (256, 576), (1, 4096), (16, 4096), (64, 4096))  # rows, context
PREFILL = (512, 2048, 8192)


def measure(name: str, sweeps: bool, report: Report) -> None:
    shape = SHAPES[name]
    deadline = Deadline(90)
    for tokens in PREFILL:
        if not deadline.passed(f"prefill of {tokens}"):
            with report.case(f"prefill {tokens}"):
                prefill(shape, tokens, report)
    for rows, context in DECODE:
        if not deadline.passed(f"decode of {rows} x {context}"):
            with report.case(f"decode {rows} x {context}"):
                decode(shape, rows, context, sweeps, report)


def random_cache(slots: int, shape: Shape) -> LayerCache:
    return LayerCache(torch.randn(slots, 2 * shape.kv_heads, shape.head_dim, device="cuda", dtype=DTYPE))


def heads_of(shape: Shape) -> Heads:
    return Heads(shape.heads, shape.kv_heads, shape.head_dim, 1 / math.sqrt(shape.head_dim), 0.0)


def gathered_attention(q: Tensor, cache: LayerCache, slots: Tensor, causal: bool) -> Tensor:
    """``q [t, H, D]`` over the tokens at `slots`, by torch."""
    keys, values = (kept.transpose(0, 1).unsqueeze(0) for kept in cache.gather(slots.long()))
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0), keys, values, is_causal=causal, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def decode(shape: Shape, rows: int, context: int, sweeps: bool, report: Report) -> None:
    heads, kv, dim = shape.heads, shape.kv_heads, shape.head_dim
    size = 2 * rows * context * 2 * kv * dim
    count = copies_for(size, most=16)
    width = 8192
    table = torch.zeros(rows, width, device="cuda", dtype=torch.int32)
    table[:, :context] = torch.randperm(rows * context, device="cuda").view(rows, context).to(torch.int32)
    caches = [random_cache(rows * context + 1, shape) for _ in range(count)]
    qkv = torch.randn(rows, heads + 2 * kv, dim, device="cuda", dtype=DTYPE)
    q, index = qkv[:, :heads], torch.arange(rows, device="cuda", dtype=torch.int32)
    positions = torch.full((rows,), context - 1, device="cuda", dtype=torch.int32)
    arrived = torch.zeros(rows * heads, device="cuda", dtype=torch.int32)
    rule, usual = segments_for(rows, kv, width), decode_tiles(DTYPE, dim)
    some = [0, rows // 2, rows - 1]
    truth = torch.cat([gathered_attention(q[r : r + 1], caches[0], table[r, :context], False) for r in some])

    def timed(segments: int, tiles: DecodeTiles, merged_here: bool, packed: bool = True) -> float:
        out = torch.full((rows, heads, dim), float("nan"), device="cuda", dtype=DTYPE)
        partial = partial_results(out, segments, arrived if merged_here else None)

        def call(cache: LayerCache) -> None:
            given = (q, cache, heads_of(shape), table, index, positions, out, partial)
            decode_attention(*given, segments=segments, packed=packed, tiles=tiles)

        call(caches[0])
        require_close(out[some], truth, 1e-2)
        return median_us([lambda cache=caches[turn % count]: call(cache) for turn in range(max(count, 8))])

    def told(us: float, segments: int, tiles: DecodeTiles, **more: object) -> None:
        fields = {"segments": segments, "tiles": tuple(tiles), "us": us, "gbps": size / us / 1e3}
        report.result("decode", rows=rows, context=context, **fields, **more)

    told(timed(rule, usual, False), rule, usual, merge="second launch")
    told(timed(rule, usual, True), rule, usual, merge="last program")
    with report.case(f"decode {rows} x {context} unpacked"):
        told(timed(rule, usual, True, packed=False), rule, usual, merge="last program", packed=False)
    if not sweeps:
        return
    for segments in sorted({max(1, rule // 4), max(1, rule // 2), rule, min(64, rule * 2)}):
        for block_n, warps, stages in ((32, 4, 5), (64, 4, 4), (64, 4, 5), (64, 8, 5), (128, 4, 5), (128, 8, 5)):
            tiles = DecodeTiles(block_n, warps, stages)
            with report.case(f"decode {rows} x {context} {segments} {tiles}"):
                told(timed(segments, tiles, True), segments, tiles, merge="last program")


def prefill(shape: Shape, tokens: int, report: Report) -> None:
    """One fresh row; torch gets its keys and values contiguous and for every query head's group, without the gather."""
    heads, kv, dim = shape.heads, shape.kv_heads, shape.head_dim
    flops = 2 * tokens * tokens * heads * dim  # two products over half the square
    device = {"device": "cuda", "dtype": torch.int32}
    cache = random_cache(tokens + 1, shape)
    table = torch.randperm(tokens, device="cuda").to(torch.int32).view(1, tokens)
    qkv = torch.randn(tokens, heads + 2 * kv, dim, device="cuda", dtype=DTYPE)
    q, out = qkv[:, :heads], torch.full((tokens, heads, dim), float("nan"), device="cuda", dtype=DTYPE)
    pairs = pairs_per_tile(tokens, heads // kv)
    tiles = torch.from_numpy(tiles_for([tokens], [0], heads // kv, pairs)).cuda()
    zero, counts = torch.zeros(1, **device), torch.tensor([tokens], **device)
    rows = PrefillTiles(tiles, torch.tensor([len(tiles)], **device), zero, zero, counts, zero, pairs, 1, [])

    def call() -> None:
        prefill_attention(q, cache, heads_of(shape), table, rows, out)

    call()
    require_close(out, gathered_attention(q, cache, table[0], True), 1e-2)
    us = median_us([call] * 4)
    report.result("prefill", tokens=tokens, by="ours", us=us, tflops=flops / us / 1e6)
    keys, values = (kept.transpose(0, 1).unsqueeze(0).contiguous() for kept in cache.gather(table[0].long()))
    queries = q.transpose(0, 1).unsqueeze(0).contiguous()
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        with report.case(f"prefill {tokens} {name}"), sdpa_kernel([backend]):
            us = median_us(
                [
                    lambda: functional.scaled_dot_product_attention(
                        queries, keys, values, is_causal=True, enable_gqa=True
                    )
                ]
                * 4
            )
            report.result("prefill", tokens=tokens, by=name, us=us, tflops=flops / us / 1e6)
