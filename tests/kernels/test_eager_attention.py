"""Attention of torch's own operations computes what the reference says, in every dtype and shape that occurs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightllmd.kernels import eager_attention, reference

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")],
    ),
]
DTYPES = [torch.float32, torch.bfloat16]
pytestmark = [pytest.mark.parametrize("device", DEVICES), pytest.mark.parametrize("dtype", DTYPES)]


def close(ours: Tensor, truth: Tensor) -> None:
    tolerance = 1e-5 if ours.dtype is torch.float32 else 2e-2
    torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


def random(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def test_rotate_turns_a_slice_in_place_and_leaves_the_rest(dtype: torch.dtype, device: str) -> None:
    qkv = random((5, 8, 16), device, dtype)
    half = torch.outer(torch.tensor([0.0, 1, 2, 30, 31]), 10000.0 ** -(torch.arange(8) / 8))
    cos = torch.cat([half.cos(), half.cos()], -1)[:, None].to(device, dtype)
    sin = torch.cat([-half.sin(), half.sin()], -1)[:, None].to(device, dtype)
    truth = reference.rotate(qkv[:, :6], cos, sin)
    kept = qkv[:, 6:].clone()
    eager_attention.rotate_(qkv[:, :6], cos, sin)
    close(qkv[:, :6], truth)
    assert torch.equal(qkv[:, 6:], kept)


def cache_of(slots: list[int], total: int, kv_heads: int, device: str, dtype: torch.dtype) -> Tensor:
    """A cache that holds numbers in `slots` and NaN everywhere else."""
    cache = torch.full((total, 2 * kv_heads, 16), float("nan"), device=device, dtype=dtype)
    kv = random((len(slots), 2 * kv_heads, 16), device, dtype, 4)
    eager_attention.write_kv(cache, torch.tensor(slots, device=device), kv)
    mirror = torch.full_like(cache, float("nan"))
    reference.write_kv(mirror, torch.tensor(slots), kv)
    assert torch.equal(cache.nan_to_num(), mirror.nan_to_num())
    return cache


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_decode_attention_reads_own_slots_only(heads: int, kv_heads: int, dtype: torch.dtype, device: str) -> None:
    lengths = [1, 19, 7]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5)).tolist()
    rows = [order[:1], order[1:20], order[20:27]]
    cache = cache_of(order[:27], 40, kv_heads, device, dtype)
    q = random((3, heads, 16), device, dtype, 6)
    padded = torch.tensor([row + row[:1] * (19 - len(row)) for row in rows], device=device)
    beyond = torch.arange(19)[None] >= torch.tensor(lengths)[:, None]
    mask = torch.zeros(3, 19, dtype=dtype).masked_fill_(beyond, float("-inf"))[:, None, None].to(device)
    ours = eager_attention.decode_attention(q, cache, padded.flatten(), mask, 0.3)
    for index, row in enumerate(rows):
        truth = reference.attention(q[index : index + 1], cache, torch.tensor(row, device=device), 0.3)
        close(ours[index : index + 1], truth)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("start", "count"), [(0, 11), (9, 5), (3, 2), (30, 700)])
@pytest.mark.parametrize("run", [False, True])
def test_prefill_attention_is_causal_behind_a_cached_prefix(
    run: bool, start: int, count: int, heads: int, kv_heads: int, dtype: torch.dtype, device: str
) -> None:
    length = start + count
    order = torch.randperm(800, generator=torch.Generator().manual_seed(5)).tolist()[:length]
    slots = list(range(4, 4 + length)) if run else order
    cache = cache_of(slots, 800, kv_heads, device, dtype)
    q = random((count, heads, 16), device, dtype, 6)
    numbers = torch.tensor(slots, device=device)
    truth = reference.attention(q, cache, numbers, 0.3)
    where = slice(4, 4 + length) if run else numbers
    close(eager_attention.prefill_attention(q, cache, where, start, 0.3), truth)
    if count == 2:
        close(eager_attention.decode_attention(q[-1:], cache, where, None, 0.3), truth[-1:])
