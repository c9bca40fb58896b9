"""How Triton kernels read and write the KV cache. No other kernel knows how a slot is laid out, so another storage (of
8 or 4 bits, with scales) is a change here and in `kv_cache`.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lightllmd.kernels.kv_cache import LayerCache


class KvPointers(NamedTuple):
    """A layer's cache as one argument of a kernel."""

    entries: Tensor  # [S, 2K, D]
    slot_stride: int  # elements from one slot to the next


def kv_pointers(cache: LayerCache) -> KvPointers:
    """The argument `cache` of the functions below."""
    return KvPointers(cache.entries, cache.entries.stride(0))


@triton.jit
def load_keys(cache, kv_head, slot, inside, DTYPE: tl.constexpr, SHAPE: tl.constexpr):
    """The keys ``[N, D]`` of one head at the slots ``slot [N]`` int64, as `DTYPE`; zeros where not ``inside [N]``,
    if that is given."""
    return _load(cache, kv_head, slot, inside, DTYPE, SHAPE.D, 0)


@triton.jit
def load_values(cache, kv_head, slot, inside, DTYPE: tl.constexpr, SHAPE: tl.constexpr):
    """As `load_keys`, of the values."""
    return _load(cache, kv_head, slot, inside, DTYPE, SHAPE.D, SHAPE.KV_HEADS * SHAPE.D)


@triton.jit
def _load(cache, kv_head, slot, inside, DTYPE: tl.constexpr, D: tl.constexpr, OFFSET: tl.constexpr):
    """`OFFSET` comes last, so that keys and values share the computation of an address."""
    at = cache.entries + kv_head * D + tl.arange(0, D)[None, :] + slot[:, None] * cache.slot_stride + OFFSET
    tile = tl.load(at) if inside is None else tl.load(at, mask=inside[:, None], other=0.0)
    return tile.to(DTYPE)


@triton.jit
def store_heads(cache, head, slot, first, second, inside, HALF: tl.constexpr):
    """Writes heads of one token to its `slot`, an int64: ``first [N, HALF]`` and ``second [N, HALF]`` are the halves of
    ``head [N, 1]``, keys in heads 0 to K - 1, values in K to 2K - 1; none where not ``inside [N, 1]``."""
    at = cache.entries + slot * cache.slot_stride + head * (2 * HALF) + tl.arange(0, HALF)[None, :]
    tl.store(at, first.to(cache.entries.dtype.element_ty), mask=inside)
    tl.store(at + HALF, second.to(cache.entries.dtype.element_ty), mask=inside)
