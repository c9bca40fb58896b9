"""Norm, rotation with cache write, activation and gathers in Triton compute what the reference says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import kv_reference
from covering import covering
from lightllmd.architecture.kv_layout import KvLayout, LayerKvLayout
from lightllmd.architecture.kv_schemes import KV_SCHEMES
from lightllmd.kernels import activation, embed, reference, rope_kv
from lightllmd.kernels.kv_cache import LayerCache, allocate
from lightllmd.kernels.linear import Norm
from lightllmd.kernels.norm import rms_norm

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter's bf16 is not that of the device.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if CUDA else [])
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def close(ours: Tensor, truth: Tensor) -> None:
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def integers(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def apart(x: Tensor) -> Tensor:
    """The same values in rows with NaN between them."""
    wide = torch.full((x.shape[0], x.shape[1] + 8, *x.shape[2:]), float("nan"), device=x.device, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


@dtypes
@pytest.mark.parametrize(("rows", "columns", "offset"), [(1, 64, 0.0), (3, 576, 1.0), (3, 1000, 0.0), (1, 4096, 1.0)])
def test_rms_norm(rows: int, columns: int, offset: float, dtype: torch.dtype) -> None:
    x, weight = random(rows, columns, dtype=dtype) * 3, random(columns, dtype=dtype, seed=1)
    out = torch.empty_like(x)
    rms_norm(apart(x), Norm(weight, 1e-5, offset), out)
    close(out, reference.rms_norm(x, weight, 1e-5, offset))
    rms_norm(x, Norm(weight, 1e-5, offset), x)
    assert torch.equal(x, out)


@dtypes
@pytest.mark.parametrize(("columns", "offset"), [(64, 0.0), (576, 1.0)])
def test_rms_norm_is_added_to_the_residual_stream_in_place(columns: int, offset: float, dtype: torch.dtype) -> None:
    x, residual = random(3, columns, dtype=dtype), random(3, columns, dtype=dtype, seed=1) * 4
    weight = random(columns, dtype=dtype, seed=2)
    truth = reference.rms_norm(x.float(), weight, 1e-6, offset) + residual.float()
    strided = apart(residual)
    rms_norm(x, Norm(weight, 1e-6, offset), strided, strided)
    close(strided, truth.to(dtype))


@pytest.mark.parametrize("cap", [30.0, 0.5])
def test_soft_cap(cap: float) -> None:
    x = random(3, 700) * cap * 2
    x[0, :7] = torch.tensor([0.0, 1e-4, 1e30, -1e30, float("inf"), -float("inf"), float("nan")])
    truth = reference.soft_cap(x, cap)
    assert activation.soft_cap_(x, cap) is x
    torch.testing.assert_close(x, truth, rtol=2e-6, atol=2e-6 * cap, equal_nan=True)


@dtypes
def test_quick_gelu(dtype: torch.dtype) -> None:
    x = random(3, 700, dtype=dtype) * 8
    x[0, :3] = torch.tensor([0.0, 60.0, -60.0])
    truth = (x.float() * torch.sigmoid(1.702 * x.float())).to(dtype)
    assert activation.quick_gelu_(x) is x
    close(x, truth)


@dtypes
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (9, 3, 64), (32, 8, 128), (5, 1, 256), (1, 1, 32)])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_kv(normed: bool, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    tokens, total = 5, heads + 2 * kv_heads
    qkv = random(tokens, total, dim, dtype=dtype)
    turn = torch.outer(torch.arange(40.0), 10000.0 ** -(torch.arange(dim // 2) / (dim // 2)))
    cos_sin = torch.cat([turn.cos(), turn.sin()], -1).to(DEVICE)
    angles, slots = integers([0, 39, 1, 7, 7]), integers([3, 11, 0, 12, 5])
    weights = (random(dim, dtype=dtype, seed=1), random(dim, dtype=dtype, seed=2)) if normed else (None, None)
    cache = torch.full((13, 2 * kv_heads, dim), float("nan"), device=DEVICE, dtype=dtype)
    ours, mirror, truth = apart(qkv), cache.clone(), qkv.clone()
    reference.rope_kv(truth, cos_sin, angles, slots, mirror, heads, kv_heads, *weights, 1e-6)
    rope_kv.rope_kv(ours, cos_sin, angles, slots, LayerCache(cache), heads, kv_heads, *weights, 1e-6)
    close(ours, truth)
    assert torch.equal(ours[:, heads + kv_heads :], qkv[:, heads + kv_heads :])
    assert torch.equal(cache[slots.long()], ours[:, heads:])
    untouched = torch.ones(13, dtype=torch.bool)
    untouched[slots.long()] = False
    assert bool(cache[untouched].isnan().all())


@covering(
    1,
    name=[name for name, scheme in KV_SCHEMES.items() if not scheme.dense],
    shape=[(4, 4, 16), (9, 3, 64), (4, 2, 128), (5, 1, 256), (1, 1, 32)],
    dtype=DTYPES,
)
def test_rope_kv_quantises_what_it_stores(name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """To the bit, whatever the sizes; and the tokens of the step are left with what is read of them later."""
    (heads, kv_heads, dim), scheme = shape, KV_SCHEMES[name]
    sizes = torch.logspace(-5, 3, 5, device=DEVICE)[:, None, None]
    qkv = (random(5, heads + 2 * kv_heads, dim, dtype=torch.float32) * sizes).to(dtype)
    qkv[2, heads:, : dim // 2] = 0.0
    turn = torch.outer(torch.arange(40.0), 10000.0 ** -(torch.arange(dim // 2) / (dim // 2)))
    cos_sin = torch.cat([turn.cos(), turn.sin()], -1).to(DEVICE)
    angles, slots = integers([0, 39, 1, 7, 7]), integers([3, 11, 0, 12, 5])
    weights = (random(dim, dtype=dtype, seed=1), random(dim, dtype=dtype, seed=2))
    layer = LayerKvLayout(kv_heads, dim, str(dtype).removeprefix("torch."), scheme)
    [cache], [mirror] = (allocate(KvLayout((layer,)), 13, torch.device(DEVICE)) for _ in range(2))
    for tensor in (*cache.tensors, *mirror.tensors):
        tensor.fill_(85)
    ours, dense = apart(qkv), qkv.clone()
    unquantised = LayerCache(torch.empty((13, 2 * kv_heads, dim), device=DEVICE, dtype=dtype))
    rope_kv.rope_kv(dense, cos_sin, angles, slots, unquantised, heads, kv_heads, *weights, 1e-6)
    rope_kv.rope_kv(ours, cos_sin, angles, slots, cache, heads, kv_heads, *weights, 1e-6)
    mirror.store(slots.long(), dense[:, heads:])
    for found, expected in zip(cache.tensors, mirror.tensors, strict=True):
        assert torch.equal(found, expected)
    values, scales = kv_reference.quantised(dense[:, heads:].cpu(), scheme)
    assert torch.equal(kv_reference.bytes_of(cache.entries[slots.long()]).cpu(), values)
    assert torch.equal(cache.tensors[1][slots.long()].transpose(1, 2).flatten(1, 2).cpu(), scales)
    # Another kernel: its compiler may contract other products and sums.
    torch.testing.assert_close(ours[:, :heads], dense[:, :heads], rtol=1e-6, atol=1e-6)
    close(ours[:, heads:], torch.cat(cache.gather(slots.long()), 1))


@dtypes
@pytest.mark.parametrize("kind", sorted(reference.ACTIVATIONS))
@pytest.mark.parametrize("columns", [48, 1536])
def test_gated(columns: int, kind: str, dtype: torch.dtype) -> None:
    x = random(3, 2 * columns, dtype=dtype) * 3
    x[0, :6] = torch.tensor([-200.0, 200.0, 0.0, -15.0, 15.0, float("nan")])
    out = torch.empty((3, columns), device=DEVICE, dtype=dtype)
    activation.gated(apart(x), kind, out)
    truth = reference.gated(x, kind)
    assert bool(out[0, 5].isnan())
    close(out.nan_to_num(), truth.nan_to_num())


@dtypes
@pytest.mark.parametrize(("hidden", "scale"), [(64, None), (576, 24.0)])
def test_embed_takes_named_and_newest_tokens_and_fills_the_table(
    hidden: int, scale: float | None, dtype: torch.dtype
) -> None:
    embedding, last = random(50, hidden, dtype=dtype), integers([9, 49, 0, 7])
    table = torch.full((4, 20), -1, dtype=torch.int32, device=DEVICE)
    tokens, rows = integers([-1, -1, 3, 0, 49]), integers([3, 1, 0, 0, 2])
    positions, slots = integers([19, 0, 4, 5, 6]), integers([100, 101, 102, 103, 104])
    mirror, out = table.clone(), torch.empty((5, hidden), device=DEVICE, dtype=dtype)
    embed.embed(tokens, rows, positions, slots, last, table, embedding, out, scale)
    assert torch.equal(out, reference.embed(tokens, rows, positions, slots, last, mirror, embedding, scale or 1.0))
    assert scale or torch.equal(out, embedding[[7, 49, 3, 0, 49]])
    assert torch.equal(table, mirror)


@dtypes
def test_gather_rows(dtype: torch.dtype) -> None:
    x, index = random(6, 100, dtype=dtype), integers([5, 0, 0, 3])
    out = torch.empty((4, 100), device=DEVICE, dtype=dtype)
    embed.gather_rows(apart(x), index, out)
    assert torch.equal(out, x[index.long()])
