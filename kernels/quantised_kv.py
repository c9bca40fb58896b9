"""Keys and values as `architecture.kv_schemes` has them, by torch's own operations. Triton's side of it is `kv_access`.

What is stored, to the bit: a group's scale is the largest magnitude of its elements, or of a scheme that is not
symmetric the largest minus the least one, divided by the highest level in fp32, kept within what fp16 can hold and
then rounded to it; `least` is rounded to fp16. An element's value is ``(element - least) / scale`` in fp32, rounded to
the nearest, halves to even, and kept within the levels. So all errors are of rounding, and a group of zeros is zeros.

Elements of float8 have three bits behind the first one, whatever their size: which of them lie near a level changes
with the scale. Of several scales, the first one and it times `FLOAT_STEPS`, that with the least sum of squared errors
is taken, of equal ones the first. With it the perplexity of SmolLM2 rises by half as much. Errors are counted in
sixteenths of a level, so that their sum is the same in whatever order it is made.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lightllmd.architecture.kv_schemes import KvScheme

# The highest level of each kind of values; the lowest is its negative, or 0 of a scheme that is not symmetric.
LEVELS = {"int8": 127.0, "int4": 7.0, "uint4": 15.0, "float8_e4m3fn": 448.0}
FLOAT_STEPS = (2.0**0.25, 2.0**0.5, 2.0**0.75)
LEAST_SCALE, MOST_SCALE = 2.0**-24, 65504.0  # what fp16 can hold


def quantise(kv: Tensor, scheme: KvScheme) -> tuple[Tensor, Tensor]:
    """``kv [T, 2K, D]`` as stored values ``[T, 2K, D / packed]`` and fp16 scales ``[T, 2K, G]``; of a scheme that is
    not symmetric ``[T, 2K, 2G]``, where `least` comes behind the scales."""
    most = LEVELS[scheme.values]
    groups = kv.unflatten(-1, (scheme.groups(kv.shape[-1]), -1)).float()
    if scheme.symmetric:
        lowest = -most
        extent = groups.abs().amax(-1) / most
        scales = _fp16(extent)
        if scheme.values == "float8_e4m3fn":
            scales = _best_scales(groups, extent, scales)
        levels = groups / scales.float().unsqueeze(-1)
    else:
        lowest = 0.0
        low, high = torch.aminmax(groups, dim=-1)
        scales, low = _fp16((high - low) / most), low.clamp_(-MOST_SCALE, MOST_SCALE).half()
        levels = (groups - low.float().unsqueeze(-1)).div_(scales.float().unsqueeze(-1))
        scales = torch.cat([scales, low], -1)
    levels = levels.flatten(-2)
    if scheme.values == "float8_e4m3fn":
        return levels.clamp_(lowest, most).to(torch.float8_e4m3fn).view(torch.uint8), scales
    levels = levels.round_().clamp_(lowest, most).to(torch.int8)
    if scheme.packed == 1:
        return levels, scales
    even, odd = levels.view(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return (even & 15) | (odd << 4), scales


def _fp16(scales: Tensor) -> Tensor:
    return scales.clamp(LEAST_SCALE, MOST_SCALE).half()


def _best_scales(groups: Tensor, extent: Tensor, scales: Tensor) -> Tensor:
    best = _error(groups, scales)
    for step in FLOAT_STEPS:
        others = _fp16(extent * step)
        error = _error(groups, others)
        better = error < best
        scales, best = torch.where(better, others, scales), torch.where(better, error, best)
    return scales


def _error(groups: Tensor, scales: Tensor) -> Tensor:
    """Of ``groups [..., E]`` in e4m3 with ``scales [...]``. Elements below 2**-6, which have fewer bits, are taken as
    if they had as many as others: what they lack is next to nothing."""
    factor = scales.float()
    levels = groups / factor.unsqueeze(-1)
    rounded = levels.view(torch.int32).add(1 << 19).bitwise_and_(-(1 << 20)).view(torch.float32)
    counted = levels.sub_(rounded).mul_(16.0).round_()
    return counted.square_().sum(-1) * (factor * factor)


def dequantise(values: Tensor, scales: Tensor, scheme: KvScheme) -> Tensor:
    """What `quantise` made, in fp32 ``[T, 2K, D]``."""
    numbers = _numbers(values, scheme)
    groups = scheme.groups(numbers.shape[-1])
    # In 16 bits, or with factors of another dtype, torch takes several times as long.
    factors = scales[..., :groups].float().unsqueeze(-1)
    numbers = numbers.unflatten(-1, (groups, -1)).mul_(factors)
    if not scheme.symmetric:
        numbers.add_(scales[..., groups:].float().unsqueeze(-1))
    return numbers.flatten(-2)


def _numbers(values: Tensor, scheme: KvScheme) -> Tensor:
    """What stored values stand for, in fp32."""
    if scheme.values == "int8":
        return values.float()
    if scheme.values == "float8_e4m3fn":
        # torch takes 30 times as long for it. Sign, exponent and mantissa are put where fp16 has them; its exponent
        # counts from 8 below.
        bits = values.view(torch.int8).to(torch.int16).mul_(1 << 7).bitwise_and_(-0x4080)
        return bits.view(torch.float16).float().mul_(2.0**8)
    pairs = _pairs(scheme.values, values.device).index_select(0, values.flatten().int())
    return pairs.view(torch.float32).view(*values.shape[:-1], -1)


@functools.cache
def _pairs(values: str, device: torch.device) -> Tensor:
    """``[256]`` int64: the two fp32 numbers that a byte stands for."""
    bytes_ = torch.arange(256)
    pairs = torch.stack([bytes_ & 15, bytes_ >> 4], -1)
    if values == "int4":
        pairs = (pairs ^ 8) - 8
    return pairs.float().view(torch.int64).squeeze(-1).to(device)
