"""Every kernel compiles for an H100 with its default tiles, fits into shared memory and keeps its numbers in registers.

A new kernel: one more function below that calls its wrapper, and its entries in `CASES`. This file is also read by
`compiling.py`, where Triton compiles instead of interpreting.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lightllmd.architecture.kv_layout import KvLayout, LayerKvLayout
from lightllmd.architecture.kv_schemes import KV_SCHEMES
from lightllmd.kernels.kv_cache import LayerCache, allocate

SPILLED = 16  # bytes; some compilers spill a register or two of the fp32 kernels
SHARED_MEMORY = 227 * 1024  # bytes that one program may have on an H100


def norms(dtype: torch.dtype) -> None:
    from lightllmd.kernels.linear import Norm
    from lightllmd.kernels.norm import rms_norm

    x, weight = torch.empty(2, 4096, dtype=dtype), torch.empty(4096, dtype=dtype)
    rms_norm(x, Norm(weight, 1e-5), x)
    rms_norm(x, Norm(weight, 1e-5, offset=1.0), x, residual=x.clone())


def rotation(dtype: torch.dtype, normed: bool, offset: int = 0, scheme: str = "dense") -> None:
    from lightllmd.kernels.rope_kv import rope_kv

    qkv, cos_sin = torch.empty(4, 48, 128, dtype=dtype), torch.empty(9, 128)
    weight = torch.empty(128, dtype=dtype) if normed else None
    cache = layer_cache(128, dtype, scheme)
    rope_kv(qkv, cos_sin, numbers(offset), numbers(offset), cache, 32, 8, weight, weight, 1e-5)


def layer_cache(dim: int, dtype: torch.dtype, scheme: str) -> LayerCache:
    """64 slots of eight heads."""
    layout = KvLayout((LayerKvLayout(8, dim, str(dtype).removeprefix("torch."), KV_SCHEMES[scheme]),))
    return allocate(layout, 64, torch.device("cpu"))[0]


def activation(dtype: torch.dtype, kind: str) -> None:
    from lightllmd.kernels.activation import gated

    gated(torch.empty(4, 2 * 14336, dtype=dtype), kind, torch.empty(4, 14336, dtype=dtype))


def soft_cap() -> None:
    from lightllmd.kernels.activation import soft_cap_

    soft_cap_(torch.empty(4, 4096), 30.0)


def products(dtype: torch.dtype, rows: int, pdl: bool = False, offset: float = 0.0) -> None:
    """Those of a layer of an 8B model."""
    from lightllmd.kernels import skinny, tiles
    from lightllmd.kernels.linear import Norm

    def product(n: int, k: int, **fused: Any) -> None:
        x, weight = torch.empty(rows, k, dtype=dtype), torch.empty(n, k, dtype=dtype)
        out = torch.empty(rows, n // 2 if "activation" in fused else n, dtype=dtype)
        if fused.pop("adds", False):
            fused["residual"] = out
        skinny.linear(x, weight, out, pdl=pdl, **fused)

    norm = {"norm": Norm(torch.empty(4096, dtype=dtype), 1e-5, offset)} if tiles.fuses_norm(rows, dtype) else {}
    product(6144, 4096, **norm)
    product(4096, 4096, adds=True)
    product(28672, 4096, activation="silu", **norm)
    product(4096, 14336, adds=True)


def packed_products(bits: int, rows: int, names: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Those of a layer of an 8B model in 4 bits (groups of 128, with zeros) or 8 (a scale for each row)."""
    from lightllmd.kernels.cards import H200
    from lightllmd.kernels.linear import Norm
    from lightllmd.kernels.packed import tiles as packed_tiles
    from lightllmd.kernels.packed.matmul import PackedWeight, multiply

    for name in names.split():
        n, k = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}[name]
        groups = k // 128 if bits == 4 else 1
        weight = PackedWeight(
            torch.empty(n * k // 4, dtype=torch.int16) if bits == 4 else torch.empty(n * k, dtype=torch.int8),
            torch.empty(groups, n, dtype=dtype if bits == 4 else torch.float32),
            torch.empty(groups, n, dtype=torch.uint8) if bits == 4 else None,
            *(n, k, bits, 128 if bits == 4 else 0),
        )
        gates, adds = name == "gate_up", name in ("o", "down")
        x, out = torch.empty(rows, k, dtype=dtype), torch.empty(rows, n // 2 if gates else n, dtype=dtype)
        tile = packed_tiles.tile_for(H200, rows, n, k, bits, weight.group, gates)
        if tile is None:
            continue  # cuBLAS multiplies it
        fuses = not adds and packed_tiles.fuses_norm(tile, rows, dtype, 0.0)
        norm = Norm(torch.empty(k, dtype=dtype), 1e-5) if fuses else None
        arrived, pdl = torch.zeros(1024, dtype=torch.int32), packed_tiles.overlaps(rows, n)
        residual, activation = out if adds else None, "silu" if gates else None
        multiply(x, weight, out, tile, arrived, norm, None, residual, activation, pdl)


def packed_variants(*variants: tuple[int, int, torch.dtype | None, torch.dtype], wide: bool, rows: int) -> None:
    """Of 1000 outputs, whose last block is no whole one, and 576 inputs: (bits, group, dtype of zeros, of inputs)."""
    from lightllmd.kernels.packed.matmul import PackedWeight, multiply
    from lightllmd.kernels.packed.tiles import PackedTile

    n, k = 1000, 576
    tile = PackedTile("wide", 64, 64, 4, 1, 4, splits=2) if wide else PackedTile("skinny", rows, 32, 4, 1, 3)
    for bits, group, zeros, dtype in variants:
        groups = -(-k // group) if group else 1
        weight = PackedWeight(
            torch.empty(n * k // 4, dtype=torch.int16) if bits == 4 else torch.empty(n * k, dtype=torch.uint8),
            torch.empty(groups, n, dtype=dtype if bits == 4 else torch.float32),
            None if zeros is None else torch.empty(groups, n, dtype=zeros),
            *(n, k, bits, group),
        )
        x, out, bias = torch.empty(rows, k, dtype=dtype), torch.empty(rows, n, dtype=dtype), torch.empty(n, dtype=dtype)
        multiply(x, weight, out, tile, torch.zeros(64, dtype=torch.int32), None, bias, out)


def packed_made_dense(bits: int) -> None:
    from lightllmd.kernels.packed.dense import dense

    n, k, groups = 4096, 4096, 32 if bits == 4 else 1
    values = torch.empty(n * k // 4, dtype=torch.int16) if bits == 4 else torch.empty(n * k, dtype=torch.int8)
    scale = torch.empty(groups, n, dtype=torch.bfloat16 if bits == 4 else torch.float32)
    zero = torch.empty(groups, n, dtype=torch.uint8) if bits == 4 else None
    dense(values, scale, zero, torch.empty(2048, k, dtype=torch.bfloat16), 0, n, bits, 128 if bits == 4 else 0)


def rounded_inputs(scheme: str) -> None:
    """With the norm before them, as they are, and with the activation of an MLP."""
    from lightllmd.architecture.schemes import SCHEMES
    from lightllmd.kernels.linear import Norm
    from lightllmd.kernels.w8a8.rounded_rows import quantise_rows

    norm, rows = Norm(torch.empty(4096, dtype=BF16), 1e-5), partial(torch.empty, dtype=BF16)
    quantise_rows(rows(8, 4096), SCHEMES[scheme], norm=norm, pdl=True)
    quantise_rows(rows(8, 14336), SCHEMES[scheme], pdl=True)
    quantise_rows(rows(8, 28672), SCHEMES[scheme], activation="silu")


def w8a8(scheme: str, rows: int, *matmuls: str) -> None:
    """Those of a layer of an 8B model, overlapping."""
    from lightllmd.architecture.schemes import SCHEMES
    from lightllmd.kernels.linear import Norm
    from lightllmd.kernels.w8a8.matmul import Weight8, launch
    from lightllmd.kernels.w8a8.rounded_rows import QuantisedRows

    stored = SCHEMES[scheme]
    kind = getattr(torch, stored.values)
    shapes = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
    for name in matmuls or shapes:
        n, k = shapes[name]
        weight = Weight8(stored, torch.empty(n, k, dtype=kind), torch.empty(stored.groups(k), n), copied=True)
        activation, adds = "silu" if name == "gate_up" else None, name in ("out", "down")
        out = torch.empty(rows, n // 2 if activation else n, dtype=BF16)
        norm = Norm(torch.empty(k, dtype=BF16), 1e-5) if rows == 1 and not adds else None
        x: Any = torch.empty(1, k, dtype=BF16)
        if rows > 1:
            x = QuantisedRows(torch.empty(rows, k, dtype=kind), torch.empty(stored.groups(k), rows))
        kernel, grid, arguments, options = launch(x, weight, out, norm, out if adds else None, activation, True, None)
        kernel[grid](*arguments, **options | ({"NATIVE": True} if rows == 1 else {}))


def gathers(dtype: torch.dtype, offset: int = 0, scale: float | None = None) -> None:
    from lightllmd.kernels.embed import embed, gather_rows

    x, embedding = torch.empty(4, 4096, dtype=dtype), torch.empty(99, 4096, dtype=dtype)
    table, of_token = torch.zeros(5, 64, dtype=torch.int32), [numbers(offset) for _ in range(4)]
    embed(*of_token, torch.zeros(5, dtype=torch.int32), table, embedding, x, scale)
    gather_rows(x, numbers(offset), x.clone())


def sampling(
    plain: bool, search: bool, masked: bool = False, offset: int = 0, raw: bool = True, typical: bool = False
) -> None:
    from lightllmd.kernels.sampling import sample

    vocab, table = 128256, torch.zeros(5, 16, dtype=torch.int32)
    masks = torch.zeros(5, vocab // 32, dtype=torch.int32) if masked else None
    counts, eos = torch.zeros(5, vocab, dtype=torch.int16), torch.zeros(2, dtype=torch.int32)
    rows, last = numbers(offset), torch.zeros(5, dtype=torch.int32)
    logits = torch.empty(4, vocab)
    for shaped in (None, torch.empty(4, vocab)) if search else (None,):
        more = {"biased": shaped, "shaped": shaped, "raw": raw, "typical": torch.ones(5) if typical else None}
        sample(logits, table, rows, numbers(offset), counts, eos, masks, last, plain, search, **more)


def one_shots(dtype: torch.dtype, ranks: int) -> None:
    """Of decode rows of an 8B model, overlapping; with a residual, without, and the largest of scales."""
    from lightllmd.architecture.collectives_memory import Regions, limits_of
    from lightllmd.kernels.collectives_one_shot import Mail, one_shot

    regions = Regions.of(ranks, limits_of(ranks))
    boxes = tuple(torch.empty(regions.flags // 4, dtype=torch.int32) for _ in range(ranks))
    mail = Mail(boxes, torch.zeros(regions.mail_programs, dtype=torch.int32), 1)
    x, scales = torch.empty(8, 4096, dtype=dtype), torch.empty(8, 1)
    one_shot(x, x.clone(), x, mail, pdl=True)
    one_shot(x, None, x, mail, pdl=True)
    one_shot(scales, None, scales, mail, largest=True, pdl=True)


def two_shots(dtype: torch.dtype, ranks: int) -> None:
    """Of a prompt of an 8B model, and the logits of its vocabulary."""
    from lightllmd.architecture.collectives_memory import PROGRAMS, Regions, limits_of
    from lightllmd.kernels.collectives_two_shot import ShareExchange, gather, two_shot

    regions, each = Regions.of(ranks, limits_of(ranks)), range(ranks)
    parts, results = (tuple(torch.empty(ranks * regions.share, dtype=torch.uint8) for _ in each) for _ in range(2))
    flags = tuple(torch.empty(2 * PROGRAMS * ranks, dtype=torch.int32) for _ in each)
    exchange = ShareExchange(parts, results, flags, torch.zeros(PROGRAMS, dtype=torch.int32), 1)
    x = torch.empty(512, 4096, dtype=dtype)
    two_shot(x, x.clone(), x, exchange)
    two_shot(x, None, x, exchange)
    gather(torch.empty(4, 128256 // ranks), torch.empty(4, 128256), exchange)


def numbers(offset: int) -> Tensor:
    """Four of those that a step uploads together: they begin anywhere."""
    return torch.zeros(16, dtype=torch.int32)[offset : offset + 4]


def at_another_offset() -> None:
    """Kernels of other cases."""
    for offset in (1, 2):
        rotation(BF16, True, offset)
        gathers(BF16, offset)
        sampling(False, True, offset=offset, typical=True)
        decode_attention(BF16, 128, 16, offset=offset)
        prefill_attention(BF16, 128, 8192, offset=offset)
        prefill_attention(BF16, 128, 256, 2, offset=offset)


def decode_attention(
    dtype: torch.dtype, dim: int, segments: int, merged_at_once: bool = False, offset: int = 0, **kind: Any
) -> None:
    from lightllmd.kernels.decode_attention import decode_attention
    from lightllmd.kernels.segments import partial_results

    given, index, out = attended(dtype, dim, offset, **kind)
    arrived = torch.zeros(4 * 32, dtype=torch.int32) if merged_at_once else None
    decode_attention(*given, index, index, out, partial_results(out, segments, arrived), segments=segments)


def prefill_attention(
    dtype: torch.dtype,
    dim: int,
    tokens: int,
    segments: int = 1,
    offset: int = 0,
    bidirectional: bool = False,
    **kind: Any,
) -> None:
    """In segments: what a block of a prompt has beside decode rows."""
    from lightllmd.kernels import prefill_attention, split_prefill
    from lightllmd.kernels.layout import PrefillTiles
    from lightllmd.kernels.segments import partial_results

    given, index, out = attended(dtype, dim, offset, **kind)
    pairs = prefill_attention.pairs_per_tile(tokens, 4) if segments == 1 else split_prefill.PAIRS
    rows = PrefillTiles(index.view(2, 2), index, index, index, index, index, pairs, segments, [])
    rows.bidirectional = index if bidirectional else None
    partial = partial_results(out, segments, torch.zeros(1024, dtype=torch.int32))
    if partial is None:
        prefill_attention.prefill_attention(*given, rows, out)
    else:
        split_prefill.split_prefill(*given, rows, out, partial)


def attended(
    dtype: torch.dtype, dim: int, offset: int, scheme: str = "dense", **kind: Any
) -> tuple[tuple[Any, ...], Tensor, Tensor]:
    """Queries, cache, heads and table of 32 query and 8 key/value heads, then indices, then what is written. `kind`:
    window and cap."""
    from lightllmd.kernels.layout import Heads

    queries, cache = torch.empty(4, 48, dim, dtype=dtype)[:, :32], layer_cache(dim, dtype, scheme)
    given = queries, cache, Heads(32, 8, dim, 0.1, 1e-5, **kind), torch.zeros(5, 64, dtype=torch.int32)
    return given, numbers(offset), torch.empty(4, 32, dim, dtype=dtype)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OFFSET = "at another offset"
# As `packed_variants` takes them: what checkpoints have.
PACKED_VARIANTS = [
    *((4, 16, torch.uint8, BF16), (4, 96, torch.uint8, FP16), (4, 128, None, BF16), (4, 0, torch.uint8, BF16)),
    *((8, 64, torch.int16, BF16), (8, 32, None, BF16), (8, 0, torch.int16, FP16)),
]
CASES: dict[str, Callable[[], None]] = {
    "norms bf16": partial(norms, BF16),
    "rotation bf16, normed": partial(rotation, BF16, True),
    "rotation fp16": partial(rotation, FP16, False),
    "rotation fp32, normed": partial(rotation, FP32, True),
    "silu bf16": partial(activation, BF16, "silu"),
    "gelu bf16": partial(activation, BF16, "gelu"),
    "gelu_tanh fp16": partial(activation, FP16, "gelu_tanh"),
    "relu fp32": partial(activation, FP32, "relu"),
    "products bf16, 1 row": partial(products, BF16, 1),
    "products bf16, 2 rows, overlapping": partial(products, BF16, 2, True),
    "products fp16, 1 row, norm with an offset": partial(products, FP16, 1, offset=1.0),
    "products bf16, 8 rows, overlapping": partial(products, BF16, 8, True),
    "products bf16, 32 rows": partial(products, BF16, 32),
    "products bf16, 64 rows": partial(products, BF16, 64),
    "products bf16, 128 rows": partial(products, BF16, 128),
    "rounded inputs, w8a8": partial(rounded_inputs, "w8a8"),
    "rounded inputs, fp8_block": partial(rounded_inputs, "fp8_block"),
    "w8a8, 1 row": partial(w8a8, "w8a8", 1),
    "fp8, 1 row": partial(w8a8, "fp8", 1, "gate_up"),
    "fp8_block, 1 row": partial(w8a8, "fp8_block", 1),
    "w8a8, 8 rows": partial(w8a8, "w8a8", 8),
    "fp8, 8 rows": partial(w8a8, "fp8", 8, "gate_up", "down"),
    "fp8_block, 32 rows": partial(w8a8, "fp8_block", 32),
    "fp8, 64 rows": partial(w8a8, "fp8", 64),
    "w8a8, 128 rows": partial(w8a8, "w8a8", 128),
    "fp8_block, 128 rows": partial(w8a8, "fp8_block", 128, "gate_up"),
    "w8a8, 256 rows": partial(w8a8, "w8a8", 256),
    "w8a8, 2048 rows": partial(w8a8, "w8a8", 2048, "qkv", "down"),
    "fp8, 2048 rows": partial(w8a8, "fp8", 2048, "gate_up", "down"),
    "fp8_block, 2048 rows": partial(w8a8, "fp8_block", 2048, "gate_up", "down"),
    "sampling, greedy": partial(sampling, True, False),
    "sampling, limited": partial(sampling, False, True),
    "sampling, masked": partial(sampling, False, True, True),
    "sampling, processed log-probabilities": partial(sampling, False, True, raw=False),
    "sampling, typical": partial(sampling, False, True, typical=True),
    "packed 4 bits, 1 row": partial(packed_products, 4, 1, "gate_up"),
    "packed 4 bits, 1 row, narrow": partial(packed_products, 4, 1, "qkv o"),
    "packed 4 bits, 8 rows": partial(packed_products, 4, 8, "gate_up o"),
    "packed 4 bits, 16 rows": partial(packed_products, 4, 16, "gate_up o"),
    "packed 4 bits, 32 rows": partial(packed_products, 4, 32, "o"),
    "packed 4 bits, 64 rows": partial(packed_products, 4, 64, "o gate_up"),
    "packed 4 bits, 128 rows": partial(packed_products, 4, 128, "o gate_up"),
    "packed 4 bits, 256 rows": partial(packed_products, 4, 256, "down"),
    "packed 4 bits, 256 rows at once": partial(packed_products, 4, 256, "gate_up"),
    "packed 4 bits, fp16": partial(packed_products, 4, 8, "o", torch.float16),
    "packed 8 bits, 1 row": partial(packed_products, 8, 1, "gate_up"),
    "packed 8 bits, 8 rows": partial(packed_products, 8, 8, "gate_up"),
    "packed 8 bits, 32 rows": partial(packed_products, 8, 32, "o"),
    "packed 8 bits, 64 rows": partial(packed_products, 8, 64, "o gate_up"),
    "packed 8 bits, 256 rows": partial(packed_products, 8, 256, "o gate_up"),
    "packed groups of 32": partial(packed_variants, (4, 32, torch.uint8, BF16), wide=True, rows=60),
    "packed variants, few rows": partial(packed_variants, *PACKED_VARIANTS, wide=False, rows=8),
    "packed variants, 32 rows": partial(packed_variants, *PACKED_VARIANTS, wide=False, rows=32),
    "packed variants, more rows": partial(packed_variants, *PACKED_VARIANTS, wide=True, rows=60),
    "packed 4 bits made dense": partial(packed_made_dense, 4),
    "packed 8 bits made dense": partial(packed_made_dense, 8),
    "gathers bf16": partial(gathers, BF16),
    "gathers bf16, scaled": partial(gathers, BF16, scale=59.75),
    "soft cap": soft_cap,
    "one shot bf16, 2 ranks": partial(one_shots, BF16, 2),
    "one shot bf16, 8 ranks": partial(one_shots, BF16, 8),
    "one shot fp16, 4 ranks": partial(one_shots, FP16, 4),
    "two shots bf16, 2 ranks": partial(two_shots, BF16, 2),
    "two shots fp16, 3 ranks": partial(two_shots, FP16, 3),
    "two shots bf16, 8 ranks": partial(two_shots, BF16, 8),
    "decode attention bf16, one segment": partial(decode_attention, BF16, 128, 1),
    "decode attention bf16": partial(decode_attention, BF16, 128, 16),
    "decode attention bf16, one launch": partial(decode_attention, BF16, 128, 64, True),
    "decode attention bf16, small heads": partial(decode_attention, BF16, 64, 16),
    "decode attention fp16": partial(decode_attention, FP16, 128, 16),
    "decode attention fp32": partial(decode_attention, FP32, 128, 16),
    "decode attention fp32, small heads": partial(decode_attention, FP32, 64, 16),
    "prefill attention bf16": partial(prefill_attention, BF16, 128, 8192),
    "prefill attention bf16, few tokens": partial(prefill_attention, BF16, 128, 16),
    "prefill attention bf16, small heads": partial(prefill_attention, BF16, 64, 8192),
    "prefill attention bf16, small heads, few tokens": partial(prefill_attention, BF16, 64, 16),
    "prefill attention fp16": partial(prefill_attention, FP16, 128, 8192),
    "prefill attention fp32": partial(prefill_attention, FP32, 128, 8192),
    "prefill attention fp32, small heads": partial(prefill_attention, FP32, 64, 8192),
    "split prefill attention bf16": partial(prefill_attention, BF16, 128, 256, 2),
    "split prefill attention bf16, eight segments": partial(prefill_attention, BF16, 128, 256, 8),
    "split prefill attention bf16, small heads": partial(prefill_attention, BF16, 64, 256, 4),
    "split prefill attention bf16, large heads": partial(prefill_attention, BF16, 256, 256, 2),
    "split prefill attention fp32": partial(prefill_attention, FP32, 128, 256, 2),
    # Gemma 2's, whose largest heads are the ones that fill the registers.
    "decode attention bf16, window and cap": partial(decode_attention, BF16, 256, 16, True, window=4096, soft_cap=50.0),
    "prefill attention bf16, bidirectional runs": partial(
        prefill_attention, BF16, 256, 8192, window=1024, bidirectional=True
    ),
    "split prefill attention bf16, bidirectional runs": partial(
        prefill_attention, BF16, 256, 256, 2, bidirectional=True
    ),
    "prefill attention bf16, window and cap": partial(prefill_attention, BF16, 256, 8192, window=4096, soft_cap=50.0),
    "split prefill attention bf16, window and cap": partial(
        prefill_attention, BF16, 256, 256, 2, window=4096, soft_cap=50.0
    ),
    **{
        f"{what}, {scheme} keys and values": partial(launch, *of, scheme=scheme)
        for scheme in KV_SCHEMES
        if scheme != "dense"
        for what, launch, of in [
            ("rotation bf16", rotation, (BF16, False)),
            ("decode attention bf16", decode_attention, (BF16, 128, 16, True)),
            ("prefill attention bf16", prefill_attention, (BF16, 128, 8192)),
            ("split prefill attention bf16", prefill_attention, (BF16, 128, 256, 2)),
        ]
    },
    OFFSET: at_another_offset,
}

# Tiles of as many bytes as another case's, or of fewer than those of the same kernel there.
SMALLER = (
    *("one shot bf16, 2 ranks", "one shot fp16, 4 ranks", "two shots bf16, 2 ranks", "two shots fp16, 3 ranks"),
    *("rotation fp16", "decode attention fp16", "prefill attention fp16"),
    *("decode attention fp32, small heads", "prefill attention fp32, small heads"),
    *("prefill attention bf16, small heads, few tokens", "split prefill attention bf16, small heads"),
    "split prefill attention bf16, eight segments",
    *("prefill attention bf16, bidirectional runs", "split prefill attention bf16, bidirectional runs"),
    *("packed 4 bits, 1 row, narrow", "packed 4 bits, 8 rows", "packed 4 bits, 16 rows", "packed 4 bits, 32 rows"),
    *("packed 4 bits, 64 rows", "packed 4 bits, 128 rows", "packed 4 bits, 256 rows at once", "packed 4 bits, fp16"),
    *("packed 8 bits, 1 row", "packed 8 bits, 32 rows", "packed 8 bits, 64 rows", "packed 8 bits, 256 rows"),
    *("packed variants, few rows", "packed variants, 32 rows", "packed variants, more rows"),
    *("packed 4 bits made dense", "packed 8 bits made dense"),
    *("rounded inputs, w8a8", "w8a8, 1 row", "fp8_block, 1 row", "w8a8, 8 rows", "fp8_block, 32 rows"),
    *("fp8, 64 rows", "w8a8, 128 rows", "w8a8, 256 rows", "w8a8, 2048 rows", "fp8_block, 2048 rows"),
)
# Of quantised keys and values, those that are compiled in the usual run: each kernel, and each way to store them.
QUANTISED = (
    *("rotation bf16, fp8 keys and values", "rotation bf16, int4 keys and values"),
    *("decode attention bf16, int8 keys and values", "decode attention bf16, int8_group8 keys and values"),
    "split prefill attention bf16, int8 keys and values",
)
if not os.environ.get("LIGHTLLMD_LONG_TESTS"):
    CASES = {
        case: launch
        for case, launch in CASES.items()
        if case not in SMALLER and (case in QUANTISED or not case.endswith("keys and values"))
    }


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compiling.py")), __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("case", [case for case in CASES if case != OFFSET])
def test_default_tiles_fit(case: str, compiled: list[dict[str, Any]]) -> None:
    kernels = [kernel for kernel in compiled if kernel["case"] == case]
    assert kernels
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY, kernel
        assert kernel["spilled"] <= SPILLED, kernel


def test_numbers_that_begin_at_another_offset_compile_nothing_anew(compiled: list[dict[str, Any]]) -> None:
    assert [kernel for kernel in compiled if kernel["case"] == OFFSET] == []


def test_attention_reads_two_tiles_ahead(compiled: list[dict[str, Any]]) -> None:
    """The pipeline needs five stages for that, since slots come before keys and values; with fewer it has one tile."""
    kernels = {(kernel["case"], kernel["kernel"]): kernel for kernel in compiled}
    assert kernels["decode attention bf16", "_decode"]["shared"] >= 2 * 2 * 32 * 128 * 2
    assert kernels["prefill attention bf16", "_prefill"]["shared"] >= 3 * 2 * 128 * 128 * 2
    assert kernels["split prefill attention bf16", "_split_prefill"]["shared"] >= 3 * 2 * 128 * 128 * 2


def test_decode_attention_of_8_bits_reads_two_tiles_ahead_and_no_bytes_one_by_one(
    compiled: list[dict[str, Any]],
) -> None:
    kernels = {(kernel["case"], kernel["kernel"]): kernel for kernel in compiled}
    kernel = kernels["decode attention bf16, int8 keys and values", "_decode"]
    assert kernel["shared"] >= 2 * 2 * 64 * 128
    assert kernel["byte_loads"] == 0


def test_ranks_see_what_others_send_in_order(compiled: list[dict[str, Any]]) -> None:
    """In one shot what is sent is stored with the number of its call, 8 bytes at a time; in two shots flags are stored
    with release behind it and looked at with acquire. All of it at the scope of the system, nothing by multicast."""
    seen = {kernel["kernel"]: kernel["system"] for kernel in compiled if kernel["case"].endswith("ranks")}
    letters = ["ld.relaxed.sys.global.v2.b64", "st.relaxed.sys.global.v2.b64"]
    flags = ["atom.global.sys.acquire.add.u32", "atom.global.sys.release.exch.b32"]
    assert seen == {"_one_shot": letters, "_two_shot": flags, "_gather": flags}


def test_prefill_attention_multiplies_by_warp_groups(compiled: list[dict[str, Any]]) -> None:
    kernels = [kernel for kernel in compiled if " prefill attention bf16" in f" {kernel['case']}"]
    assert all(kernel["wgmma"] for kernel in kernels)


def test_fp8_of_wide_weights_is_multiplied_as_fp8(compiled: list[dict[str, Any]]) -> None:
    """By warp groups; Hopper's other matrix instructions have no fp8, and numbers are made fp16 for them."""
    kernels = [kernel for kernel in compiled if kernel["case"] in ("fp8, 8 rows", "fp8_block, 128 rows")]
    assert kernels[0]["wgmma"]
    assert kernels[-1]["wgmma"]
