"""Quantised KV caches beside the dense one: the write in the RoPE kernel, decode and prefill attention. Each result is
compared with torch's attention over what torch's own path reads of the same cache."""

from __future__ import annotations

import functools
from itertools import product

import torch
from cases.attention import DECODE, gathered_attention, heads_of
from cases.products import DTYPE, SHAPES, Shape
from cases.timing import Deadline, Report, copies_for, median_us, require_close

from lightllmd.architecture.kv_layout import KvLayout, LayerKvLayout
from lightllmd.architecture.kv_schemes import KV_SCHEMES
from lightllmd.kernels.decode_attention import DecodeTiles, decode_attention, decode_tiles, segments_for
from lightllmd.kernels.kv_access import kv_storage
from lightllmd.kernels.kv_cache import LayerCache, allocate
from lightllmd.kernels.layout import PrefillTiles
from lightllmd.kernels.prefill_attention import pairs_per_tile, prefill_attention, tiles_for
from lightllmd.kernels.rope_kv import rope_kv
from lightllmd.kernels.segments import partial_results

PREFILL = ((512, 0), (2048, 0), (2048, 6144))  # tokens, cached ones before them
WIDTH = 8192
TILES = [(block, warps, stages) for block, warps, stages in product((32, 64, 128), (4, 8), (4, 5))]


def measure(name: str, sweeps: bool, checks: bool, report: Report) -> None:
    """`checks`: results alone, no times."""
    shape = SHAPES[name]
    for scheme in KV_SCHEMES:
        deadline = Deadline(90)
        for tokens in (1, 64, 2048):
            with report.case(f"{scheme} write of {tokens}"):
                write(shape, scheme, tokens, checks, report)
        for tokens, cached in PREFILL:
            if not deadline.passed(f"{scheme} prefill of {tokens}"):
                with report.case(f"{scheme} prefill {tokens} behind {cached}"):
                    prefill(shape, scheme, tokens, cached, checks, report)
        for rows, context in DECODE:
            if not deadline.passed(f"{scheme} decode of {rows} x {context}"):
                with report.case(f"{scheme} decode {rows} x {context}"):
                    decode(shape, scheme, rows, context, sweeps, checks, report)


def cache_of(shape: Shape, scheme: str, slots: int, filled: bool = True) -> LayerCache:
    layer = LayerKvLayout(shape.kv_heads, shape.head_dim, str(DTYPE).removeprefix("torch."), KV_SCHEMES[scheme])
    [cache] = allocate(KvLayout((layer,)), slots, torch.device("cuda"))
    for first in range(0, slots if filled else 0, 1 << 14):
        some = torch.arange(first, min(slots, first + (1 << 14)), device="cuda")
        cache.store(some, torch.randn(len(some), 2 * shape.kv_heads, shape.head_dim, device="cuda", dtype=DTYPE))
    return cache


def bytes_of(cache: LayerCache) -> int:
    """Of a slot."""
    return sum(tensor[0].nbytes for tensor in cache.tensors)


def write(shape: Shape, scheme: str, tokens: int, checks: bool, report: Report) -> None:
    """What is stored equals torch's to the bit, given the keys that a dense write makes."""
    heads, kv, dim = shape.heads, shape.kv_heads, shape.head_dim
    slots = torch.randperm(tokens + 7, device="cuda")[:tokens].to(torch.int32)
    angles = torch.arange(tokens, device="cuda", dtype=torch.int32) % 4096
    turns = torch.rand(4096, dim // 2, device="cuda") * 6.28
    cos_sin = torch.cat([turns.cos(), turns.sin()], 1)
    qkv = torch.randn(tokens, heads + 2 * kv, dim, device="cuda", dtype=DTYPE)
    caches = [cache_of(shape, each, tokens + 7, filled=False) for each in ("dense", scheme, scheme)]
    turned = [qkv.clone() for _ in range(2)]

    def call(rows: torch.Tensor, cache: LayerCache) -> None:
        rope_kv(rows, cos_sin, angles, slots, cache, heads, kv, None, None, 1e-5)

    for rows, cache in zip(turned, caches[:2], strict=True):
        call(rows, cache)
    caches[2].store(slots.long(), turned[0][:, heads:])
    for ours, truth in zip(caches[1].tensors, caches[2].tensors, strict=True):
        if not torch.equal(ours[slots.long()], truth[slots.long()]):
            raise ValueError(f"{scheme}: other bits than torch's")
    require_close(turned[1][:, heads:], torch.cat(caches[1].gather(slots.long()), 1), 5e-3)
    if not checks:
        report.result("kv write", scheme=scheme, tokens=tokens, us=median_us([lambda: call(qkv, caches[1])] * 8))


def decode(shape: Shape, scheme: str, rows: int, context: int, sweeps: bool, checks: bool, report: Report) -> None:
    heads, kv, dim = shape.heads, shape.kv_heads, shape.head_dim
    table = torch.zeros(rows, WIDTH, device="cuda", dtype=torch.int32)
    table[:, :context] = torch.randperm(rows * context, device="cuda").view(rows, context).to(torch.int32)
    first = cache_of(shape, scheme, rows * context + 1)
    size = rows * context * bytes_of(first)
    caches = [first] + [cache_of(shape, scheme, rows * context + 1) for _ in range(copies_for(size, most=8) - 1)]
    qkv = torch.randn(rows, heads + 2 * kv, dim, device="cuda", dtype=DTYPE)
    q, index = qkv[:, :heads], torch.arange(rows, device="cuda", dtype=torch.int32)
    positions = torch.full((rows,), context - 1, device="cuda", dtype=torch.int32)
    arrived = torch.zeros(rows * heads, device="cuda", dtype=torch.int32)
    some = [0, rows // 2, rows - 1]
    truth = torch.cat([gathered_attention(q[r : r + 1], first, table[r, :context], False) for r in some])
    rule = segments_for(rows, kv, WIDTH)
    usual = decode_tiles(torch.int8 if kv_storage(first, DTYPE, paired=True).PAIRED else DTYPE, dim)
    candidates = [DecodeTiles(*tiles) for tiles in TILES] if sweeps else []
    for tiles in dict.fromkeys([usual, *candidates]):
        with report.case(f"{scheme} decode {rows} x {context} {tuple(tiles)}"):
            out = torch.full((rows, heads, dim), float("nan"), device="cuda", dtype=DTYPE)
            partial = partial_results(out, rule, arrived)

            def call(cache: LayerCache, out=out, partial=partial, tiles=tiles) -> None:
                given = (q, cache, heads_of(shape), table, index, positions, out, partial)
                decode_attention(*given, segments=rule, tiles=tiles)

            call(first)
            require_close(out[some], truth, 1e-2)
            if not checks:
                us = median_us([functools.partial(call, caches[turn % len(caches)]) for turn in range(8)])
                told = {"tiles": tuple(tiles), "us": us, "gbps": size / us / 1e3}
                report.result("kv decode", scheme=scheme, rows=rows, context=context, **told)


def prefill(shape: Shape, scheme: str, tokens: int, cached: int, checks: bool, report: Report) -> None:
    """One row behind cached tokens."""
    heads, kv, dim = shape.heads, shape.kv_heads, shape.head_dim
    total, device = tokens + cached, {"device": "cuda", "dtype": torch.int32}
    cache = cache_of(shape, scheme, total + 1)
    table = torch.randperm(total, device="cuda").to(torch.int32).view(1, total)
    q = torch.randn(tokens, heads + 2 * kv, dim, device="cuda", dtype=DTYPE)[:, :heads]
    out = torch.full((tokens, heads, dim), float("nan"), device="cuda", dtype=DTYPE)
    pairs = pairs_per_tile(tokens, heads // kv)
    tiles = torch.from_numpy(tiles_for([tokens], [cached], heads // kv, pairs)).cuda()
    zero, counts, starts = (torch.tensor([number], **device) for number in (0, tokens, cached))
    rows = PrefillTiles(tiles, torch.tensor([len(tiles)], **device), zero, zero, counts, starts, pairs, 1, [])

    def call() -> None:
        prefill_attention(q, cache, heads_of(shape), table, rows, out)

    call()
    some = [0, tokens // 2, tokens - 1]
    truth = [gathered_attention(q[at : at + 1], cache, table[0, : cached + at + 1], False) for at in some]
    require_close(out[some], torch.cat(truth), 1e-2)
    if not checks:
        us = median_us([call] * 4)
        flops = 2 * tokens * (tokens + 2 * cached) * heads * dim
        report.result("kv prefill", scheme=scheme, tokens=tokens, cached=cached, us=us, tflops=flops / us / 1e6)
