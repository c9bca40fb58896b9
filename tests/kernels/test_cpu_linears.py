"""A CPU's linears of quantised weights multiply with what those stand for, whichever of torch's kernels they choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fake_quantised import stored_inputs
from lightllmd.architecture.cpu_storage import cpu_nbytes
from lightllmd.architecture.schemes import SCHEMES, Scheme
from lightllmd.kernels.cpu import int4 as int4_linear
from lightllmd.kernels.cpu.linears import cpu_linears
from lightllmd.kernels.dequantised_linear import DequantisedLinear
from lightllmd.kernels.eager import EagerKernels
from lightllmd.kernels.linear import Linear, Norm
from lightllmd.kernels.quantised import QuantisedMatrix, quantise
from lightllmd.kernels.reference import rms_norm

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float32]
# Whole blocks and vectors, and a remainder of each.
SHAPES = [(128, 192), (33, 131)]
ROWS = [1, 8, 9, 80]
W4, W8, BYTES = SCHEMES["w4a16"], SCHEMES["w8a16"], SCHEMES["w8a8"]
STORED = {
    "w8a16": W8,
    "w8a8": BYTES,
    "static w8a8": replace(BYTES, static=True),
    "groups of 32": replace(W4, group=32),
    "groups of 96": replace(W4, group=96),  # three of torch's to one
    "groups of 128": W4,  # the last one is shorter, or the only one
    "whole rows of 4 bits": replace(W4, group=0),
    "4 bits in an order of their own": replace(W4, group=32, ordered=True),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype) -> QuantisedMatrix:
    made = quantise((random(rows, columns) / columns**0.5).to(dtype), scheme)
    if scheme.ordered:
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(1)).int()
        made = replace(made, order=order)
    return replace(made, input_scale=torch.tensor(0.05)) if scheme.static else made


def exact(x: Tensor, weight: QuantisedMatrix) -> Tensor:
    """fp64."""
    wide, scheme = x.double(), weight.scheme
    if weight.input_scale is not None:
        wide = (wide / 0.05).round().clamp(-128, 127) * weight.input_scale.double()
    elif scheme.inputs:
        wide = torch.from_numpy(stored_inputs(wide.numpy(), scheme).numbers)
    return wide @ weight.dense(torch.float64).T


def close(ours: Tensor, truth: Tensor) -> None:
    assert ours.isfinite().all()
    tolerance = 2e-6 if ours.dtype is torch.float32 else 1.2e-2  # of bf16 three half steps: sum, scale, residual
    assert ((ours.double() - truth).abs().max() / truth.abs().max()).item() < tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STORED)
def test_a_linear_multiplies_with_what_its_weight_stands_for(name: str, dtype: torch.dtype) -> None:
    scheme, kernels = STORED[name], EagerKernels(CPU, dtype)
    for rows, columns in SHAPES:
        weight = matrix(scheme, rows, columns, dtype)
        for count in ROWS:
            x, residual = random(count, columns, seed=2).to(dtype), random(count, rows, seed=3).to(dtype)
            x[:, 5] *= 30  # as real models have it
            bias = random(rows, seed=4).to(dtype) if count % 2 else None
            with torch.inference_mode():
                linear = kernels.linear("down", weight, bias)
                truth = exact(x, weight) + (0 if bias is None else bias.double())
                close(linear(x), truth)
                close(linear(x, residual=residual.clone()), truth + residual.double())
                close(linear(torch.cat([x, x], 1)[:, columns:]), truth)


@pytest.mark.parametrize("name", ["w8a16", "w8a8", "groups of 32"])
def test_what_stands_around_it_is_what_it_would_be_apart(name: str) -> None:
    weight = matrix(STORED[name], 128, 64, torch.float32)
    x, norm = random(3, 64, seed=2), Norm(random(64, seed=4), 1e-5)
    linear = EagerKernels(CPU, torch.float32).linear("gate_up", weight, None)
    truth = exact(rms_norm(x, norm.weight, 1e-5), weight)
    gate, up = truth.chunk(2, 1)
    close(linear(x, norm=norm), truth)
    close(linear(x, norm=norm, activation="silu"), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_take_what_the_plan_counts(dtype: torch.dtype) -> None:
    """A CPU's w8a8 has four bytes more for each output; its w4a16 four to a group, and groups of 256 at the most."""
    rows, columns = 64, 512
    for name in ("w8a16", "w8a8", "groups of 128", "whole rows of 4 bits"):
        scheme = STORED[name]
        linear = EagerKernels(CPU, dtype).linear("down", matrix(scheme, rows, columns, dtype), None)
        assert type(linear) is not DequantisedLinear
        held = sum(
            torch.ops.mkldnn._nbytes(each) if each.is_mkldnn else each.nbytes for each in linear.tensors().values()
        )
        planned = cpu_nbytes(scheme, (rows, columns), dtype.itemsize)
        assert planned == held, name


def of_scheme(name: str, dtype: torch.dtype) -> Callable[..., Linear]:
    return cpu_linears(dtype)[name]


def test_blocks_that_are_not_known_are_left_to_torchs_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = matrix(STORED["groups of 32"], 128, 64, torch.bfloat16), random(80, 64, seed=2).bfloat16()
    monkeypatch.setattr(int4_linear, "halves_of_blocks", lambda: False)
    close(of_scheme("w4a16", torch.bfloat16)(weight)(x), exact(x, weight))


def test_what_a_cpu_has_no_kernel_for_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    kernels = EagerKernels(CPU, torch.bfloat16)
    for name in ("w8a16", "fp8", "fp8", "fp8_block"):
        kernels.linear("down", random(64, 64).bfloat16(), None, SCHEMES[name])
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "fp8" in caplog.text
    assert "w8a16" not in caplog.text


@pytest.mark.parametrize("name", ["w8a16", "w8a8", "static w8a8", "groups of 32"])
def test_a_token_that_is_no_number_stays_none_and_alone(name: str) -> None:
    """A sampler finds out by its logits that a model's numbers are broken."""
    linear = EagerKernels(CPU, torch.bfloat16).linear("down", matrix(STORED[name], 128, 64, torch.bfloat16), None)
    for count in (3, 80):
        x = random(count, 64, seed=2).bfloat16()
        x[1, 7] = float("nan")
        out = linear(x)
        assert out[1].isnan().all()
        assert out[[0, *range(2, count)]].isfinite().all()
