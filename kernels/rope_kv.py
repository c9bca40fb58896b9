"""Rotary embedding of queries and keys, with their norm where a family has one, and the write to the KV cache: one
Triton kernel between the product of q, k and v and the attention. Meaning: `reference`.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightllmd.kernels.kv_access import kv_pointers, kv_storage, store_heads
from lightllmd.kernels.kv_cache import LayerCache

TILE = 1024  # pairs of elements of a program


@triton.jit(do_not_specialize_on_alignment=["angles", "slots"])
def _rope_kv(
    qkv,
    cos_sin,
    angles,
    slots,
    cache,
    q_norm,
    k_norm,
    token_stride,
    head_stride,
    angle_stride,
    heads,
    kv_heads,
    eps,
    offset,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    KV: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    pair = tl.arange(0, HALF)[None, :]
    inside = head < heads + 2 * kv_heads
    at = qkv + token * token_stride + head * head_stride + pair
    # Values pass unchanged: they are neither normed nor turned, and both selections are exact.
    turned = head < heads + kv_heads
    raw_first = tl.load(at, mask=inside, other=0.0)
    raw_second = tl.load(at + HALF, mask=inside, other=0.0)
    first, second = raw_first.to(tl.float32), raw_second.to(tl.float32)
    if NORM:
        mean = tl.sum(first * first + second * second, 1)[:, None] / (2 * HALF)
        scale = tl.rsqrt(mean + eps)
        of_q, of_k = q_norm + pair, k_norm + pair
        of_first = tl.where(head < heads, tl.load(of_q).to(tl.float32), tl.load(of_k).to(tl.float32))
        of_second = tl.where(head < heads, tl.load(of_q + HALF).to(tl.float32), tl.load(of_k + HALF).to(tl.float32))
        first *= scale * (offset + of_first)
        second *= scale * (offset + of_second)
    angle = cos_sin + tl.load(angles + token).to(tl.int64) * angle_stride + pair
    cos, sin = tl.load(angle), tl.load(angle + HALF)
    kind = qkv.dtype.element_ty
    new_first = tl.where(turned, (first * cos - second * sin).to(kind), raw_first)
    new_second = tl.where(turned, (second * cos + first * sin).to(kind), raw_second)
    written = turned if KV.VALUES == "" else head < heads
    tl.store(at, new_first, mask=written)
    tl.store(at + HALF, new_second, mask=written)
    kept = inside & (head >= heads)
    slot = tl.load(slots + token).to(tl.int64)
    read = store_heads(cache, head - heads, slot, new_first, new_second, kept, kv_heads, HALF, KV)
    if KV.VALUES != "":
        tl.store(at, read[0].to(kind), mask=kept)
        tl.store(at + HALF, read[1].to(kind), mask=kept)


def rope_kv(
    qkv: Tensor,
    cos_sin: Tensor,
    angles: Tensor,
    slots: Tensor,
    cache: LayerCache,
    heads: int,
    kv_heads: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    offset: float = 0.0,
) -> None:
    """Turns the queries and keys of ``qkv [T, H + 2K, D]`` in place, element i with i + D/2 (D a power of two), and
    copies keys and values to the cache at ``slots [T]`` int32. Where they are quantised there, `qkv` gets what will be
    read of them, rounded to its dtype: whatever attends to these tokens sees the same as who comes later.

    ``cos_sin [P, D]`` fp32: cosines, then sines, of the D/2 pairs; ``angles [T]`` int32 is each token's row of it.
    `q_norm` and `k_norm` ``[D]``: weights less `offset` of an RMS norm of each head before the turn; both or neither.
    """
    tokens, total, dim = qkv.shape
    half = dim // 2
    block = min(triton.next_power_of_2(total), max(1, TILE // half))
    _rope_kv[(tokens, triton.cdiv(total, block))](
        qkv,
        cos_sin,
        angles,
        slots,
        kv_pointers(cache),
        q_norm if q_norm is not None else cos_sin,
        k_norm if k_norm is not None else cos_sin,
        qkv.stride(0),
        qkv.stride(1),
        cos_sin.stride(0),
        heads,
        kv_heads,
        eps,
        offset,
        NORM=q_norm is not None,
        HEADS=block,
        HALF=half,
        KV=kv_storage(cache),
        num_warps=4,
    )
