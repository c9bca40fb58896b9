"""The fast versions of the operations compute what the reference says, in every dtype and shape that occurs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightllmd.kernels import eager_ops, reference
from lightllmd.kernels.linear import DenseLinear, PackedLinear

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


@pytest.mark.parametrize("rows", [1, 2, 7, 65])
@pytest.mark.parametrize(("out", "inner"), [(48, 32), (131, 40), (96, 576)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", [DenseLinear, PackedLinear])
def test_linear(kind: type, biased: bool, out: int, inner: int, rows: int, dtype: torch.dtype, device: str) -> None:
    if kind is PackedLinear and (device != "cpu" or not PackedLinear.supports(dtype)):
        pytest.skip(f"oneDNN packs no {dtype} on this {device}")
    x, weight = random((rows, inner), device, dtype), random((out, inner), device, dtype, 1) / inner**0.5
    bias = random((out,), device, dtype, 2) if biased else None
    residual = random((rows, out), device, dtype, 3)
    with torch.inference_mode():
        linear = kind(weight.clone(), bias)
        close(linear(x), reference.linear(x, weight, bias))
        close(linear(x, residual.clone()), reference.linear(x, weight, bias, residual))
    assert linear.out_features == out


@pytest.mark.parametrize("rows", [1, 5])
def test_rms_norm(rows: int, dtype: torch.dtype, device: str) -> None:
    x, weight = random((rows, 96), device, dtype) * 3, random((96,), device, dtype, 1)
    close(eager_ops.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
def test_gated(activation: str, dtype: torch.dtype, device: str) -> None:
    x = random((5, 96), device, dtype)
    close(eager_ops.gated(x.clone(), activation), reference.gated(x, activation))
