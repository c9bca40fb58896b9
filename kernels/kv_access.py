"""How Triton kernels read and write the KV cache. No other kernel knows how a slot is laid out: another storage is a
change here and in `kv_cache`, and what is stored is what `quantised_kv` says, to the bit.

A key that has one scale is read without it: its scale is a factor of its scores, and a value's a factor of its weight,
so that elements are not multiplied one by one. Where groups have scales, what is read is multiplied.
"""

# mypy: allow-untyped-defs, disable-error-code="union-attr"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllmd.kernels.kv_cache import LayerCache

FP16_LIFT = 64.0  # scales are at most 516 in fp16, and weights at most 1: their products stay in its range


class KvPointers(NamedTuple):
    """A layer's cache as one argument of a kernel."""

    entries: Tensor  # [S, 2K, D], or of two elements a byte [S, 2K, D / 2]
    slot_stride: int  # elements from one slot to the next
    scales: Tensor | None  # fp16 [S, K, 2, G], or 2G; where they are folded and read: int32 [S, K], both of a head
    scale_stride: int | None  # fp16 elements from one slot to the next: never 1, which Triton makes a constant


class KvStorage(NamedTuple):
    """What the functions below are compiled for."""

    VALUES: str = ""  # of `architecture.kv_schemes.KvScheme`
    GROUP: int = 1  # elements of a head that share a scale
    FOLDED: bool = False  # a head has one scale and no least value: see above
    LIFT: float = 1.0  # of folded scales of values
    PAIRED: bool = False  # heads are loaded by `load_pairs`
    UNIT: float = 1.0  # what a number 1.0 stands for that comes of a pair, scales apart
    ASSEMBLY: bool = False  # it is compiled, not interpreted


def kv_pointers(cache: LayerCache) -> KvPointers:
    """The argument `cache` of `store_heads`."""
    if cache.scales is None:
        return KvPointers(cache.entries, cache.entries.stride(0), None, None)
    return KvPointers(cache.entries, cache.entries.stride(0), cache.scales, cache.scales.stride(0))


def read_pointers(cache: LayerCache, paired: bool = False) -> KvPointers:
    """The argument `cache` of what loads; `paired` where that is `load_pairs`."""
    pointers, storage = kv_pointers(cache), kv_storage(cache, paired=paired)
    if cache.scales is None or not storage.FOLDED:
        return pointers
    both = cache.scales.flatten(-2).view(torch.int32)  # of a head, as one load of 32 bits
    entries = cache.entries.view(torch.int16) if storage.PAIRED else cache.entries
    return KvPointers(entries, entries.stride(0), both, cache.scales.stride(0))


def kv_storage(cache: LayerCache, dtype: torch.dtype | None = None, paired: bool = False) -> KvStorage:
    """The argument `KV`; `dtype` is that of queries. Heads are `paired` where they can be."""
    if cache.scales is None:
        return KvStorage()
    scheme, dim = cache.scheme, cache.entries.shape[-1] * cache.scheme.packed
    group = scheme.group_of(dim)
    folded = scheme.symmetric and group == dim
    paired = paired and folded and scheme.packed == 1 and dim >= 32  # a product has 16 columns or more
    lift = FP16_LIFT if dtype is torch.float16 or (paired and dtype is torch.bfloat16) else 1.0
    unit = 256.0 if paired and scheme.values == "float8_e4m3fn" else 1.0
    return KvStorage(scheme.values, group, folded, lift, paired, unit, not triton.knobs.runtime.interpret)


@triton.jit
def load_keys(cache, kv_head, slot, inside, DTYPE: tl.constexpr, SHAPE: tl.constexpr):
    """The keys ``[N, D]`` of one head at the slots ``slot [N]`` int64, as `DTYPE`; zeros where not ``inside [N]``,
    if that is given. Without their scales where these are folded."""
    return _load(cache, kv_head, slot, inside, DTYPE, SHAPE, 0)


@triton.jit
def load_values(cache, kv_head, slot, inside, DTYPE: tl.constexpr, SHAPE: tl.constexpr):
    """As `load_keys`, of the values."""
    return _load(cache, kv_head, slot, inside, DTYPE, SHAPE, 1)


@triton.jit
def load_scales(cache, kv_head, slot, inside, SHAPE: tl.constexpr):
    """Where they are folded: the scales of the keys and of the values at ``slot [N]``, fp32 ``[N]`` each; those of keys
    times `UNIT`, those of values times `LIFT`."""
    at = cache.scales + slot * (cache.scale_stride >> 1) + kv_head
    both = tl.load(at) if inside is None else tl.load(at, mask=inside, other=0)
    key = (both & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    value = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return key.to(tl.float32) * SHAPE.KV.UNIT, value.to(tl.float32) * SHAPE.KV.LIFT


@triton.jit
def _load(cache, kv_head, slot, inside, DTYPE: tl.constexpr, SHAPE: tl.constexpr, PART: tl.constexpr):
    """`PART`: 0 for keys, 1 for values. Its offset comes last, so that both share the computation of an address."""
    D: tl.constexpr = SHAPE.D
    KV: tl.constexpr = SHAPE.KV
    PACKED: tl.constexpr = 2 if KV.VALUES == "int4" or KV.VALUES == "uint4" else 1
    WIDTH: tl.constexpr = D // PACKED
    OFFSET: tl.constexpr = PART * SHAPE.KV_HEADS * WIDTH
    # Triton 3.6 multiplies wrongly what is joined of two halves of fewer than 16: a byte is loaded for each of them.
    APART: tl.constexpr = PACKED == 2 and D < 32
    element = tl.arange(0, D) // 2 if APART else tl.arange(0, WIDTH)
    at = cache.entries + kv_head * WIDTH + element[None, :] + slot[:, None] * cache.slot_stride + OFFSET
    tile = tl.load(at) if inside is None else tl.load(at, mask=inside[:, None], other=0)
    if APART:
        tile = (tile >> (tl.arange(0, D) % 2 * 4)[None, :].to(tl.uint8)) & 15
    if KV.VALUES == "":
        tile = tile.to(DTYPE)
    elif KV.FOLDED:
        tile = _numbers(tile, DTYPE, KV, APART)
    else:
        G: tl.constexpr = D // KV.GROUP
        EACH: tl.constexpr = 2 * G if KV.VALUES == "uint4" else G
        row_at = cache.scales + kv_head * (2 * EACH) + slot * cache.scale_stride + PART * EACH
        scales_at = row_at[:, None] + tl.arange(0, G)[None, :]
        numbers = _numbers(tile, tl.float32, KV, APART).reshape(slot.shape[0], G, KV.GROUP)
        numbers *= _load_fp16(scales_at, inside)[:, :, None]
        if KV.VALUES == "uint4":
            numbers += _load_fp16(scales_at + G, inside)[:, :, None]
        tile = numbers.reshape(slot.shape[0], D).to(DTYPE)
    return tile


@triton.jit
def _load_fp16(at, inside):
    scales = tl.load(at) if inside is None else tl.load(at, mask=inside[:, None], other=0.0)
    return scales.to(tl.float32)


@triton.jit
def _numbers(stored, DTYPE: tl.constexpr, KV: tl.constexpr, APART: tl.constexpr = False):
    """What stored values ``[N, W]`` stand for: ``[N, W]``, or ``[N, 2W]`` of two in a byte that are not `APART` yet."""
    if KV.VALUES == "int8":
        numbers = stored
    elif KV.VALUES == "float8_e4m3fn":
        # Sign, exponent and mantissa where fp16 has them, whose exponent counts from 8 below.
        bits = stored.to(tl.int16)
        numbers = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    elif APART:
        numbers = stored.to(tl.int32)
        if KV.VALUES == "int4":
            numbers = (numbers ^ 8) - 8
    else:
        low, high = (stored & 15).to(tl.int32), (stored >> 4).to(tl.int32)
        if KV.VALUES == "int4":
            low, high = (low ^ 8) - 8, (high ^ 8) - 8
        numbers = tl.join(low, high).reshape(stored.shape[0], 2 * stored.shape[1])
    return numbers.to(DTYPE)


@triton.jit
def load_pairs(cache, kv_head, slot, inside, SHAPE: tl.constexpr, PART: tl.constexpr):
    """``[N, D / 2]`` int16, two neighbouring elements each: keys where `PART` is 0, values where it is 1.

    Tensor cores take operands of 16 bits from shared memory in either order, which they can't with 8 bits: bytes would
    be fetched one by one where the order is the other one. So even and odd elements are multiplied apart.
    """
    PAIRS: tl.constexpr = SHAPE.D // 2
    OFFSET: tl.constexpr = PART * SHAPE.KV_HEADS * PAIRS
    at = cache.entries + kv_head * PAIRS + tl.arange(0, PAIRS)[None, :] + slot[:, None] * cache.slot_stride + OFFSET
    return tl.load(at, mask=inside[:, None], other=0)


@triton.jit
def even_of(pairs, SHAPE: tl.constexpr, DTYPE: tl.constexpr):
    """What the first elements of pairs stand for, in units of `UNIT`, scales apart; exact in fp16."""
    # int8: with the sign turned over, in the mantissa of 1024, of which 1024 + 128 are taken.
    # fp8: sign, exponent and mantissa where fp16 has them, whose exponent counts from 8 below.
    if SHAPE.KV.VALUES == "int8":
        if SHAPE.KV.ASSEMBLY:
            numbers = tl.inline_asm_elementwise(
                "{ .reg .b32 t, c; and.b32 t, $1, 0x00FF00FF; xor.b32 t, t, 0x64806480; "
                "mov.b32 c, 0x64806480; sub.rn.f16x2 $0, t, c; }",
                *("=r,r", [pairs], tl.float16, True, 2),
            )
        else:
            numbers = ((pairs & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    elif SHAPE.KV.ASSEMBLY:
        numbers = tl.inline_asm_elementwise(
            "{ .reg .b32 s, m; shl.b32 s, $1, 8; and.b32 s, s, 0x80008000; "
            "shl.b32 m, $1, 7; and.b32 m, m, 0x3F803F80; or.b32 $0, s, m; }",
            *("=r,r", [pairs], tl.float16, True, 2),
        )
    else:
        numbers = (((pairs << 8) & -0x8000) | ((pairs << 7) & 0x3F80)).to(tl.int16).to(tl.float16, bitcast=True)
    return numbers.to(DTYPE)


@triton.jit
def odd_of(pairs, SHAPE: tl.constexpr, DTYPE: tl.constexpr):
    """As `even_of`, of the second elements."""
    if SHAPE.KV.VALUES == "int8":
        if SHAPE.KV.ASSEMBLY:
            numbers = tl.inline_asm_elementwise(
                "{ .reg .b32 t, c; shr.u32 t, $1, 8; and.b32 t, t, 0x00FF00FF; xor.b32 t, t, 0x64806480; "
                "mov.b32 c, 0x64806480; sub.rn.f16x2 $0, t, c; }",
                *("=r,r", [pairs], tl.float16, True, 2),
            )
        else:
            numbers = (((pairs >> 8) & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True) - 1152.0
    elif SHAPE.KV.ASSEMBLY:
        numbers = tl.inline_asm_elementwise(
            "{ .reg .b32 s, m; and.b32 s, $1, 0x80008000; shr.u32 m, $1, 1; and.b32 m, m, 0x3F803F80; "
            "or.b32 $0, s, m; }",
            *("=r,r", [pairs], tl.float16, True, 2),
        )
    else:
        numbers = ((pairs & -0x8000) | ((pairs >> 1) & 0x3F80)).to(tl.int16).to(tl.float16, bitcast=True)
    return numbers.to(DTYPE)


@triton.jit
def store_heads(cache, head, slot, first, second, inside, kv_heads, HALF: tl.constexpr, KV: tl.constexpr):
    """Writes heads of one token to its `slot`, an int64: ``first [N, HALF]`` and ``second [N, HALF]`` are the halves of
    ``head [N, 1]``, keys in heads 0 to K - 1, values in K to 2K - 1; none where not ``inside [N, 1]``. Returns both
    as they will be read."""
    if KV.VALUES == "":
        at = cache.entries + slot * cache.slot_stride + head * (2 * HALF) + tl.arange(0, HALF)[None, :]
        tl.store(at, first.to(cache.entries.dtype.element_ty), mask=inside)
        tl.store(at + HALF, second.to(cache.entries.dtype.element_ty), mask=inside)
    else:
        first, second = _store_quantised(cache, head, slot, first, second, inside, kv_heads, HALF, KV)
    return first, second


@triton.jit
def _store_quantised(cache, head, slot, first, second, inside, kv_heads, HALF: tl.constexpr, KV: tl.constexpr):
    N: tl.constexpr = first.shape[0]
    WHOLE: tl.constexpr = KV.GROUP > HALF  # a group is all of a head, else a part of a half
    EACH: tl.constexpr = HALF if WHOLE else KV.GROUP
    PARTS: tl.constexpr = HALF // EACH  # groups of a half
    COUNT: tl.constexpr = 1 if WHOLE else 2 * PARTS  # of a head
    NUMBERS: tl.constexpr = 2 * COUNT if KV.VALUES == "uint4" else COUNT  # fp16 ones of a head
    PACKED: tl.constexpr = 2 if KV.VALUES == "int4" or KV.VALUES == "uint4" else 1
    WIDTH: tl.constexpr = HALF // PACKED
    one = first.to(tl.float32).reshape(N, PARTS, EACH)
    two = second.to(tl.float32).reshape(N, PARTS, EACH)
    part = (head >= kv_heads).to(tl.int32)
    scales_at = cache.scales + slot * cache.scale_stride + ((head - part * kv_heads) * 2 + part) * NUMBERS
    scales_at = scales_at + tl.arange(0, PARTS)[None, :]
    if KV.VALUES == "uint4":
        low_one, low_two, high_one, high_two = tl.min(one, 2), tl.min(two, 2), tl.max(one, 2), tl.max(two, 2)
        if WHOLE:
            low_one, high_one = tl.minimum(low_one, low_two), tl.maximum(high_one, high_two)
            low_two, high_two = low_one, high_one
        extent_one, extent_two = high_one - low_one, high_two - low_two
        low_one, low_two = _fp16(low_one, -65504.0), _fp16(low_two, -65504.0)
        tl.store(scales_at + COUNT, low_one, mask=inside)
        if not WHOLE:
            tl.store(scales_at + COUNT + PARTS, low_two, mask=inside)
        one, two = one - low_one.to(tl.float32)[:, :, None], two - low_two.to(tl.float32)[:, :, None]
    else:
        extent_one, extent_two = tl.max(tl.abs(one), 2), tl.max(tl.abs(two), 2)
        if WHOLE:
            extent_one = tl.maximum(extent_one, extent_two)
            extent_two = extent_one
        low_one, low_two = None, None
    extent_one, extent_two = _divided(extent_one, KV), _divided(extent_two, KV)
    if KV.VALUES == "float8_e4m3fn":
        scale_one = _best_scale(one, two, extent_one)
        scale_two = scale_one
    else:
        scale_one, scale_two = _fp16(extent_one, 2.0**-24), _fp16(extent_two, 2.0**-24)
    tl.store(scales_at, scale_one, mask=inside)
    if not WHOLE:
        tl.store(scales_at + PARTS, scale_two, mask=inside)
    stored_one, read_one = _quantised(one, scale_one, low_one, N, HALF, KV)
    stored_two, read_two = _quantised(two, scale_two, low_two, N, HALF, KV)
    at = cache.entries + slot * cache.slot_stride + head * (2 * WIDTH) + tl.arange(0, WIDTH)[None, :]
    tl.store(at, stored_one.to(cache.entries.dtype.element_ty), mask=inside)
    tl.store(at + WIDTH, stored_two.to(cache.entries.dtype.element_ty), mask=inside)
    return read_one, read_two


@triton.jit
def _fp16(x, LEAST: tl.constexpr):
    return tl.minimum(tl.maximum(x, LEAST), 65504.0).to(tl.float16)


@triton.jit
def _divided(extent, KV: tl.constexpr):
    """By the highest level."""
    most = (
        127.0
        if KV.VALUES == "int8"
        else 448.0
        if KV.VALUES == "float8_e4m3fn"
        else 7.0
        if KV.VALUES == "int4"
        else 15.0
    )
    return tl.div_rn(extent, tl.full(extent.shape, most, tl.float32))


@triton.jit
def _best_scale(one, two, extent):
    """That of `quantised_kv` for elements of float8, of heads in two halves ``[N, 1, HALF]``."""
    scale = _fp16(extent, 2.0**-24)
    best = _error(one, two, scale)
    for step in tl.static_range(1, 4):
        other = _fp16(extent * 2.0 ** (step / 4), 2.0**-24)
        error = _error(one, two, other)
        scale = tl.where(error < best, other, scale)
        best = tl.minimum(error, best)
    return scale


@triton.jit
def _error(one, two, scale):
    factor = scale.to(tl.float32)
    return (_counted(one, factor) + _counted(two, factor)).to(tl.float32) * (factor * factor)


@triton.jit
def _counted(half, factor):
    levels = tl.div_rn(half, tl.broadcast_to(factor[:, :, None], half.shape))
    rounded = ((levels.to(tl.int32, bitcast=True) + (1 << 19)) & -1048576).to(tl.float32, bitcast=True)
    sixteenths = _rounded((levels - rounded) * 16.0).to(tl.int32)
    return tl.sum(sixteenths * sixteenths, 2)


@triton.jit
def _quantised(groups, scale, least, N: tl.constexpr, HALF: tl.constexpr, KV: tl.constexpr):
    """Of ``groups [N, G, E]`` above their least values: what is stored, ``[N, HALF / packed]``, and what it stands for,
    ``[N, HALF]``."""
    scale = scale.to(tl.float32)[:, :, None]
    levels = tl.div_rn(groups, tl.broadcast_to(scale, groups.shape))
    if KV.VALUES == "float8_e4m3fn":
        size = tl.minimum(tl.abs(levels), 448.0)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        code = tl.where(size < 0.015625, _rounded(size * 512.0).to(tl.int32), normal)
        code = code | ((levels.to(tl.int32, bitcast=True) >> 24) & 0x80)
        number = _numbers(code.to(tl.uint8), tl.float32, KV)
    else:
        most = 127.0 if KV.VALUES == "int8" else 7.0 if KV.VALUES == "int4" else 15.0
        number = tl.minimum(tl.maximum(_rounded(levels), 0.0 if KV.VALUES == "uint4" else -most), most)
        code = number.to(tl.int32)
    read = number * scale
    if least is not None:
        read += least.to(tl.float32)[:, :, None]
    if KV.VALUES == "int4" or KV.VALUES == "uint4":
        even, odd = tl.split(code.reshape(N, HALF // 2, 2))
        stored = (even & 15) | ((odd & 15) << 4)
    else:
        stored = code.reshape(N, HALF)
    return stored, read.reshape(N, HALF)


@triton.jit
def _rounded(x):
    """To the nearest integer, halves to even; magnitudes below 2**22."""
    return tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, x)
