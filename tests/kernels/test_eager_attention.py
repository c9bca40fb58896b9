"""Attention of torch's own operations computes what the reference says, in every dtype and shape that occurs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightllmd.kernels import eager_attention, reference
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.layout import DecodeGroup, Heads, PrefillRow

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
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


def cache_of(slots: list[int], total: int, kv_heads: int, device: str, dtype: torch.dtype) -> LayerCache:
    """A cache that holds numbers in `slots` and NaN everywhere else."""
    cache = LayerCache(torch.full((total, 2 * kv_heads, 16), float("nan"), device=device, dtype=dtype))
    kv = random((len(slots), 2 * kv_heads, 16), device, dtype, 4)
    cache.store(torch.tensor(slots, device=device), kv)
    mirror = torch.full_like(cache.entries, float("nan"))
    reference.write_kv(mirror, torch.tensor(slots), kv)
    assert torch.equal(cache.entries.nan_to_num(), mirror.nan_to_num())
    return cache


KINDS = [(None, None), (1, None), (5, None), (13, 0.5), (1000, None), (None, 0.5)]
kinds = pytest.mark.parametrize(("window", "soft_cap"), KINDS)


@kinds
@pytest.mark.parametrize(("lengths", "heads", "kv_heads"), [([1, 19, 7], 6, 2), ([9, 9, 9], 4, 4), ([19], 5, 1)])
def test_decode_attention_reads_own_slots_only(
    lengths: list[int],
    heads: int,
    kv_heads: int,
    window: int | None,
    soft_cap: float | None,
    dtype: torch.dtype,
    device: str,
) -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5)).tolist()
    rows = [order[sum(lengths[:index]) :][:length] for index, length in enumerate(lengths)]
    cache = cache_of(order[: sum(lengths)], 40, kv_heads, device, dtype)
    q = random((len(lengths), heads, 16), device, dtype, 6)
    longest = max(lengths)
    padded = torch.tensor([row + row[:1] * (longest - len(row)) for row in rows], device=device)
    beyond = torch.arange(longest)[None] >= torch.tensor(lengths)[:, None]
    mask = torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, float("-inf"))[:, None, None].to(device)
    group = DecodeGroup(None, padded.flatten(), mask if beyond.any() else None)
    shape = Heads(heads, kv_heads, 16, 0.3, 0.0, window, soft_cap)
    ours = eager_attention.decode_attention(q, cache, shape, group)
    for index, row in enumerate(rows):
        slots = torch.tensor(row, device=device)
        close(ours[index], reference.attention(q[index : index + 1], cache.entries, slots, 0.3, window, soft_cap)[0])


@kinds
@pytest.mark.parametrize(
    ("start", "count", "run", "heads", "kv_heads"),
    [(0, 11, False, 5, 1), (9, 5, True, 6, 2), (3, 2, True, 4, 4), (3, 2, False, 6, 2), (30, 700, False, 4, 2)],
)
def test_prefill_attention_is_causal_behind_a_cached_prefix(
    run: bool,
    start: int,
    count: int,
    heads: int,
    kv_heads: int,
    window: int | None,
    soft_cap: float | None,
    dtype: torch.dtype,
    device: str,
) -> None:
    length = start + count
    order = torch.randperm(800, generator=torch.Generator().manual_seed(5)).tolist()[:length]
    slots = list(range(4, 4 + length)) if run else order
    cache = cache_of(slots, 800, kv_heads, device, dtype)
    q = random((count, heads, 16), device, dtype, 6)
    numbers = torch.tensor(slots, device=device)
    shape = Heads(heads, kv_heads, 16, 0.3, 0.0, window, soft_cap)
    truth = reference.attention(q, cache.entries, numbers, 0.3, window, soft_cap)
    where = slice(4, 4 + length) if run else numbers
    close(eager_attention.prefill_attention(q, cache, shape, PrefillRow(0, count, start, where)), truth)
    if count == 2:
        last = eager_attention.decode_attention(q[-1:], cache, shape, DecodeGroup(None, where, None))
        close(last, truth[-1:])


RUNS = [
    (0, 11, [(0, 4), (4, 11)]),
    (9, 25, [(10, 13), (20, 34)]),
    (30, 60, [(31, 55), (60, 87)]),  # longer than what is computed at a time
]


@kinds
@pytest.mark.parametrize(("start", "count", "runs"), RUNS)
def test_tokens_of_a_bidirectional_run_see_those_behind_them(
    start: int,
    count: int,
    runs: list[tuple[int, int]],
    window: int | None,
    soft_cap: float | None,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(eager_attention, "MASK_ROWS", 16)
    length = start + count
    cache = cache_of(list(range(4, 4 + length)), 100, 2, device, dtype)
    q = random((count, 4, 16), device, dtype, 6)
    slots = torch.arange(4, 4 + length, device=device)
    truth = reference.attention(q, cache.entries, slots, 0.3, window, soft_cap, runs)
    row = PrefillRow(0, count, start, slice(4, 4 + length), runs)
    close(eager_attention.prefill_attention(q, cache, Heads(4, 2, 16, 0.3, 0.0, window, soft_cap), row), truth)
