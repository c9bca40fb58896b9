"""What the attention kernels share: the arguments of their launches, and the kinds of attention, which are compiled in.

Scores are exponents of 2 throughout: scaled, and multiplied by log2(e).
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lightllmd.kernels.kv_access import KvPointers, KvStorage, kv_storage, read_pointers
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.layout import Heads

LOG2_E = 1.4426950408889634


class Operands(NamedTuple):
    """What an attention kernel reads and writes, as one argument."""

    q: Tensor  # [T, H, D]; tokens may lie apart
    cache: KvPointers
    table: Tensor  # [R, W] int32, request->slot
    out: Tensor  # [T, H, D], contiguous
    q_stride: int
    table_stride: int
    scale: float


class AttentionShape(NamedTuple):
    """What an attention kernel is compiled for."""

    KV_HEADS: int
    GROUP: int  # query heads per key/value head
    D: int  # elements of a head, a power of two from 16 on
    WINDOW: int  # keys that a query sees, up to its own; 0: all
    SOFT_CAP: float  # of scores; 0: none
    KV: KvStorage


def operands(q: Tensor, cache: LayerCache, heads: Heads, table: Tensor, out: Tensor, paired: bool = False) -> Operands:
    """The first argument of every attention kernel; `paired`: of one that loads pairs where it can."""
    return Operands(q, read_pointers(cache, paired), table, out, q.stride(0), table.stride(0), heads.scale * LOG2_E)


def attention_shape(q: Tensor, cache: LayerCache, heads: Heads, paired: bool = False) -> AttentionShape:
    """The argument `SHAPE` of every attention kernel, as `operands`."""
    cap, stored = (heads.soft_cap or 0.0) * LOG2_E, kv_storage(cache, q.dtype, paired)
    return AttentionShape(heads.kv, heads.query // heads.kv, heads.dim, heads.window or 0, cap, stored)


@triton.jit
def first_seen(position, WINDOW: tl.constexpr):
    """The first key that the query at `position` sees."""
    first = 0
    if WINDOW:
        first = tl.maximum(position + 1 - WINDOW, 0)
    return first


@triton.jit
def store_lines(out, line, ours, value, D: tl.constexpr):
    """``value [L, D]`` to the lines ``line [L]`` of `out` where `ours`."""
    at = out + line[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=ours[:, None])
