"""The fast versions of the operations compute what the reference says, in every dtype and shape that occurs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightllmd.kernels import eager_ops, reference
from lightllmd.kernels.eager import EagerKernels
from lightllmd.kernels.eager_linear import DenseLinear, PackedLinear
from lightllmd.kernels.layout import Batch, GatheredRows
from lightllmd.kernels.linear import Norm

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16]
pytestmark = [pytest.mark.parametrize("device", DEVICES), pytest.mark.parametrize("dtype", DTYPES)]


def close(ours: Tensor, truth: Tensor) -> None:
    tolerance = 1e-5 if ours.dtype is torch.float32 else 2e-2
    torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


def random(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


# Pairwise: every two of kind, shape, rows and bias meet.
@pytest.mark.parametrize(
    ("kind", "out", "inner", "rows", "biased"),
    [
        (DenseLinear, 48, 32, 1, True),
        (DenseLinear, 130, 40, 2, False),
        (DenseLinear, 96, 576, 65, True),
        (PackedLinear, 48, 32, 65, False),
        (PackedLinear, 130, 40, 1, True),
        (PackedLinear, 96, 576, 2, True),
        (PackedLinear, 96, 576, 1, False),
    ],
)
def test_linear(kind: type, biased: bool, out: int, inner: int, rows: int, dtype: torch.dtype, device: str) -> None:
    if kind is PackedLinear and (device != "cpu" or not PackedLinear.supports(dtype)):
        pytest.skip(f"oneDNN packs no {dtype} on this {device}")
    x, weight = random((rows, inner), device, dtype), random((out, inner), device, dtype, 1) / inner**0.5
    bias = random((out,), device, dtype, 2) if biased else None
    residual = random((rows, out), device, dtype, 3)
    norm = Norm(random((inner,), device, dtype, 4) / 4, 1e-5, offset=1.0)
    post_norm = Norm(random((out,), device, dtype, 5), 1e-5)
    plain = reference.linear(x, weight, bias)
    normed = reference.linear(reference.rms_norm(x, norm.weight, 1e-5, 1.0), weight, bias)
    behind = reference.rms_norm(plain, post_norm.weight, 1e-5)
    with torch.inference_mode():
        linear = kind(weight.clone(), bias)
        close(linear(x), plain)
        close(linear(x, residual=residual.clone()), reference.linear(x, weight, bias, residual))
        close(linear(x, norm=norm), normed)
        close(linear(x, norm=norm, activation="silu"), reference.gated(normed, "silu"))
        close(linear(x, post_norm=post_norm, residual=residual.clone()), behind + residual)
    assert linear.out_features == out
    assert list(linear.tensors()) == ["weight", "bias"][: 1 + biased]


@pytest.mark.parametrize(("rows", "offset"), [(1, 1.0), (5, 0.0)])
def test_rms_norm(rows: int, offset: float, dtype: torch.dtype, device: str) -> None:
    x, weight = random((rows, 96), device, dtype) * 3, random((96,), device, dtype, 1)
    close(eager_ops.rms_norm(x, weight, 1e-5, offset), reference.rms_norm(x, weight, 1e-5, offset))


def test_logits_are_capped_behind_the_last_norm(dtype: torch.dtype, device: str) -> None:
    hidden, rows = random((3, 32), device, dtype), random((70, 32), device, dtype, 1)
    norm = Norm(random((32,), device, dtype, 2), 1e-5)
    truth = reference.linear(reference.rms_norm(hidden, norm.weight, 1e-5).float(), rows.float())
    kernels = EagerKernels(torch.device(device), dtype)
    for tied in (False, True):
        logits = kernels.head(rows, norm, tied=tied, soft_cap=2.0).logits(hidden)
        assert logits.dtype is torch.float32
        close(logits.to(dtype), reference.soft_cap(truth, 2.0).to(dtype))


def test_embeddings_are_scaled_by_what_the_dtype_holds_of_the_scale(dtype: torch.dtype, device: str) -> None:
    weight, tokens = random((50, 96), device, dtype), torch.tensor([3, 49, 0, 3], device=device)
    batch = Batch(tokens, tokens, tokens, tokens, GatheredRows(tokens, tokens, [], []))
    kernels = EagerKernels(torch.device(device), dtype)
    assert torch.equal(kernels.embedding(weight)(batch), weight[tokens])
    scale = torch.tensor(96**0.5, dtype=dtype, device=device)
    assert torch.equal(kernels.embedding(weight, 96**0.5)(batch), weight[tokens] * scale)


@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_gated(activation: str, dtype: torch.dtype, device: str) -> None:
    x = random((5, 96), device, dtype)
    close(eager_ops.gated(x.clone(), activation), reference.gated(x, activation))
