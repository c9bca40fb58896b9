"""How keys and values are quantised, in NumPy's float64, written from the schemes' documentation alone."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightllmd.architecture.kv_schemes import KvScheme

Floats = NDArray[np.float64]
MOST = {"int8": 127, "int4": 7, "uint4": 15, "float8_e4m3fn": 448}
# Of e4m3: four bits of exponent, biased by 7, three of mantissa; no infinities, and what would be 480 is none.
E4M3 = [
    (mantissa / 8 * 2.0**-6) if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    for exponent in range(16)
    for mantissa in range(8)
][:-1]


def quantised(kv: Tensor, scheme: KvScheme) -> tuple[Tensor, Tensor]:
    """What is stored of ``kv [..., D]``: bytes ``[..., D or D / 2]``, and scales as `dequantised` takes them."""
    *outer, dim = kv.shape
    x = kv.double().numpy().reshape(*outer, -1, scheme.group_of(dim))
    most = MOST[scheme.values]
    low: Floats = np.zeros(x.shape[:-1]) if scheme.symmetric else x.min(-1)
    extent = np.abs(x).max(-1) if scheme.symmetric else (x.max(-1) - low).astype(np.float32).astype(np.float64)
    scales = np.clip((extent / most).astype(np.float32), 2.0**-24, 65504).astype(np.float16)
    low16 = np.clip(low, -65504, 65504).astype(np.float16)
    if scheme.values == "float8_e4m3fn":
        scales = _best_scales(x, extent)
    above = (x - low16.astype(np.float64)[..., None]).astype(np.float32).astype(np.float64)
    levels = (above / scales.astype(np.float64)[..., None]).astype(np.float32)
    if scheme.values == "float8_e4m3fn":
        stored = _e4m3(levels.astype(np.float64))
    else:
        stored = np.clip(np.rint(levels), -most if scheme.symmetric else 0, most).astype(np.int8).view(np.uint8)
    stored = stored.reshape(*outer, dim)
    if scheme.packed == 2:
        stored = stored[..., 0::2] & 15 | stored[..., 1::2] << 4
    parts = [scales] if scheme.symmetric else [scales, low16]
    return torch.from_numpy(stored), torch.from_numpy(np.concatenate(parts, -1))


def _best_scales(x: Floats, extent: Floats) -> NDArray[np.float16]:
    """Of four, a quarter of a power of two apart: the first one with the least squared error, counted in sixteenths of
    a level, where levels are those of numbers with three bits behind the first one."""
    first = (extent / 448).astype(np.float32)
    steps = [np.float32(2 ** (step / 4)) for step in range(4)]
    scales = np.stack([np.clip(first * step, 2.0**-24, 65504).astype(np.float16) for step in steps])
    wide = scales.astype(np.float64)[..., None]
    levels = (x / wide).astype(np.float32).astype(np.float64)
    unit = 2.0 ** np.floor(np.log2(np.maximum(np.abs(levels), 1e-300))) / 8
    counted = np.rint((levels - np.rint(levels / unit) * unit) * 16)
    squared = (wide[..., 0] ** 2).astype(np.float32)
    errors = (counted**2).sum(-1).astype(np.float32) * squared
    return np.take_along_axis(scales, errors.argmin(0)[None], 0)[0]


def _e4m3(levels: Floats) -> NDArray[np.uint8]:
    """The nearest one, or of two that are as near the one whose last bit is 0."""
    table = np.array(E4M3)
    size = np.minimum(np.abs(levels), 448.0)
    above = np.searchsorted(table, size).clip(0, len(table) - 1)
    below = np.maximum(above - 1, 0)
    up, down = table[above] - size, size - table[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (code | (np.signbit(levels) << 7)).astype(np.uint8)


def dequantised(stored: Tensor, scales: Tensor, scheme: KvScheme) -> Tensor:
    """What it stands for, in float64."""
    codes = stored.numpy().astype(np.int64)
    if scheme.packed == 2:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)
    if scheme.values == "float8_e4m3fn":
        numbers = np.array([*E4M3, np.nan])[codes & 127] * np.where(codes & 128, -1.0, 1.0)
    elif scheme.symmetric:
        bits = 8 // scheme.packed
        numbers = ((codes + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))).astype(np.float64)
    else:
        numbers = codes.astype(np.float64)
    groups = scheme.groups(numbers.shape[-1])
    factors = scales.double().numpy()
    grouped = numbers.reshape(*numbers.shape[:-1], groups, -1) * factors[..., :groups, None]
    if not scheme.symmetric:
        grouped += factors[..., groups:, None]
    return torch.from_numpy(grouped.reshape(numbers.shape))


def bytes_of(values: Tensor) -> Tensor:
    """Stored values as `quantised` has them."""
    return values.contiguous().view(torch.uint8)


def samples(*shape: int, seed: int = 0) -> Tensor:
    """Of very different sizes, with zeros, outliers and heads that are all zeros or all alike, in fp32."""
    torch.manual_seed(seed)
    kv = torch.randn(*shape) * torch.logspace(-6, 4, shape[0])[:, None, None]
    kv[0, 0] = 0.0
    kv[-1, 0] = 3.0
    kv[shape[0] // 2, :, 3] *= 60.0
    return kv
