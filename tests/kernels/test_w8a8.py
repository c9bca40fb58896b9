"""Matmuls with 8-bit inputs and weights equal the scheme in float64, whichever kernel multiplies and whatever is fused
into it, and every kernel rounds inputs to the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from covering import covering
from lightllmd.architecture.schemes import SCHEMES, Scheme
from lightllmd.kernels import reference
from lightllmd.kernels.fused import FusedKernels
from lightllmd.kernels.linear import Norm
from lightllmd.kernels.quantised import QuantisedMatrix, quantise
from lightllmd.kernels.w8a8 import linear as w8a8_linear
from lightllmd.kernels.w8a8 import tiles as w8a8_tiles
from lightllmd.kernels.w8a8.matmul import Weight8, linear
from lightllmd.kernels.w8a8.rounded_rows import GatedProduct, quantise_rows
from lightllmd.kernels.w8a8.tiles import Tile8, WholeTile

EPS = 1e-5
NAMES = ("w8a8", "fp8", "fp8_block")
GROUPED = replace(SCHEMES["fp8_block"], group=64, rows=32)  # more groups in a small matrix
TESTED = [SCHEMES["w8a8"], SCHEMES["fp8"], GROUPED]
GEMV, DOT, SWAPPED = Tile8(True, 4, 128, 4), Tile8(False, 16, 64, 4, 3), Tile8(False, 32, 32, 4, 3, swap=True)
WHOLE, HALVES = WholeTile(32, 32, 32, 4, 3), WholeTile(16, 256, 64, 4, 3)


def random(*shape: int, device: str, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def rounded(x: Tensor, scheme: Scheme, static: float | None = None) -> tuple[Tensor, Tensor]:
    """Values in float64 and scales of fp32 inputs ``[T, K]``, group by group, as the scheme is documented."""
    level = {"int8": 127.0, "float8_e4m3fn": 448.0}[scheme.inputs]
    values, scales = [], []
    for group in x.float().cpu().split(scheme.group or x.shape[1], 1):
        largest = group.abs().amax(1, keepdim=True).clamp(min=2.0**-100)
        if static is None:
            group, scale = group * (torch.tensor(level) / largest), largest / torch.tensor(level)
        else:
            scale = torch.full_like(largest, static)
            group = (group / scale).clamp(-128.0 if scheme.inputs == "int8" else -level, level)
        values.append(group.round() if scheme.inputs == "int8" else group.to(torch.float8_e4m3fn).float())
        scales.append(scale)
    return torch.cat(values, 1).double(), torch.cat(scales, 1).double()


def spread(scales: Tensor, scheme: Scheme, columns: int) -> Tensor:
    return scales.double().cpu().repeat_interleave(scheme.group or columns, 1)[:, :columns]


def truth(x: Tensor, weight: QuantisedMatrix, bias: Tensor | None = None, static: float | None = None) -> Tensor:
    """``x @ weight.T + bias`` in float64, of fp32 inputs that are rounded as the weight's scheme says."""
    columns, scheme = x.shape[1], weight.scheme
    values, scales = rounded(x, scheme, static)
    stored = weight.values.cpu().double() * spread(weight.scales, scheme, columns)
    out = (values * spread(scales, scheme, columns)) @ stored.T
    return out if bias is None else out + bias.cpu().double()


def close(ours: Tensor, expected: Tensor) -> None:
    tolerance = 2e-6 if ours.dtype is torch.float32 else 1e-3
    scale = float(expected.abs().max())
    torch.testing.assert_close(ours.cpu().double(), expected, rtol=tolerance, atol=tolerance * scale)


def same(values: Tensor, expected: Tensor) -> None:
    assert torch.equal(values.cpu().float().double(), expected)


@pytest.mark.parametrize("scheme", TESTED, ids=NAMES)
def test_inputs_are_rounded_as_the_scheme_says_bit_for_bit(
    scheme: Scheme, device: str, every_dtype: torch.dtype
) -> None:
    x = torch.full((5, 200), float("nan"), device=device, dtype=every_dtype)[:, :150]  # rows that lie apart
    x.copy_(random(5, 150, device=device) * 3)
    x[0] = 0
    x[1, ::2] = x[1].abs().amax() / 2  # halfway between two values of int8, before the scale is rounded
    values, scales = rounded(x, scheme)
    made = quantise_rows(x, scheme)
    same(made.values, values)
    assert torch.equal(made.scales.t().cpu().double(), scales)
    given = Norm(random(150, device=device, dtype=every_dtype, seed=1), EPS, 1.0)
    values, scales = rounded(x.float() * (1 + given.weight.float()), scheme)
    made = quantise_rows(x, scheme, norm=given)
    same(made.values, values)
    factor = torch.rsqrt(x.cpu().double().square().mean(1, keepdim=True) + EPS)
    torch.testing.assert_close(made.scales.t().cpu().double(), scales * factor, rtol=3e-7, atol=0)


@pytest.mark.parametrize("scheme", TESTED, ids=NAMES)
def test_an_activation_is_rounded_without_a_rounding_before(scheme: Scheme, device: str) -> None:
    gate_up = random(3, 300, device=device)
    made = quantise_rows(gate_up, scheme, activation="silu")
    exact = reference.gated(gate_up.cpu().double(), "silu")
    values = made.values.cpu().double() * spread(made.scales.t(), scheme, 150)
    step = spread(made.scales.t(), scheme, 150) * (1.0 if scheme.inputs == "int8" else 32.0)
    assert ((values - exact).abs() <= 0.5001 * step).all()
    torch.testing.assert_close(GatedProduct(gate_up, "silu").tensor().cpu().double(), exact, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["w8a8", "fp8"])
def test_inputs_of_a_fixed_scale_are_cut_beyond_it(name: str, device: str) -> None:
    scheme = replace(SCHEMES[name], static=True)
    x, static = random(3, 150, device=device), 0.01
    scale = torch.tensor(static, device=device)
    made = quantise_rows(x, scheme, static=scale)
    values, _ = rounded(x, scheme, static)
    same(made.values, values)
    assert made.scales.eq(scale).all()
    weight = quantise(random(40, 150, device=device, dtype=torch.float32, seed=1), scheme)
    linear = FusedKernels(torch.device(device)).linear("o", replace(weight, input_scale=scale), None)
    for rows in (1, 3):
        close(linear(x[:rows]), truth(x[:rows], weight, static=static))


@pytest.mark.parametrize("scheme", TESTED, ids=NAMES)
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_no_number_stays_told(scheme: Scheme, rows: int, device: str) -> None:
    weight = quantise(random(40, 128, device=device, dtype=torch.float32, seed=1), scheme)
    multiply = FusedKernels(torch.device(device)).linear("o", weight, None)
    for fault in (float("nan"), float("inf"), -float("inf")):
        x = random(rows, 128, device=device)
        x[0, 70] = fault
        out = multiply(x)
        assert not out[0].isfinite().any()
        assert out[1:].isfinite().all()
        x = torch.cat([random(rows, 128, device=device), x], 1)
        assert not multiply(GatedProduct(x, "silu"))[0].isfinite().any()


# Rows of each kernel; inputs and outputs that fill no tile, and rows beyond one block.
@covering(
    2,
    scheme=TESTED,
    tile=[GEMV, DOT, SWAPPED, WHOLE],
    shape=[(52, 208), (64, 256), (36, 144)],
    activation=[None, "gelu_tanh", "silu"],
    biased=[False, True],
)
def test_matmuls_are_those_of_the_scheme(
    scheme: Scheme, tile: Tile8 | WholeTile, shape: tuple[int, int], activation: str | None, biased: bool, device: str
) -> None:
    check(scheme, tile, 1 if tile == GEMV else 37, shape, activation, biased, device)


@pytest.mark.parametrize("scheme", TESTED, ids=NAMES)
@pytest.mark.parametrize("tile", [GEMV, DOT, SWAPPED, WHOLE, HALVES], ids=["gemv", "dot", "swapped", "whole", "halves"])
def test_residual_stream_is_updated_in_place(scheme: Scheme, tile: Tile8 | WholeTile, device: str) -> None:
    check(scheme, tile, 1 if tile == GEMV else 3, (52, 208), None, True, device)


def test_inputs_that_fill_no_word_are_rounded_before(device: str) -> None:
    for scheme in TESTED:
        check(scheme, DOT, 1, (20, 75), "silu", True, device)


def check(
    scheme: Scheme,
    tile: Tile8 | WholeTile,
    rows: int,
    shape: tuple[int, int],
    activation: str | None,
    biased: bool,
    device: str,
) -> None:
    """One matmul against the scheme in float64; out is a slice, and what lies beside it stays NaN."""
    outputs, columns = shape
    made = outputs // 2 if activation else outputs
    x, gain = random(rows, columns, device=device) * 2, random(columns, device=device, seed=1)
    stored = quantise(random(outputs, columns, device=device, dtype=torch.float32, seed=2) / columns**0.5, scheme)
    bias = random(outputs, device=device, seed=3) if biased else None
    weight = Weight8(scheme, stored.values, stored.scales.t().contiguous(), None, bias)
    norm = Norm(gain, EPS)
    around = torch.full((rows + 1, made + 16), float("nan"), device=device, dtype=torch.float16)
    out = around[:rows, :made]
    factor = torch.rsqrt(x.cpu().double().square().mean(1, keepdim=True) + EPS)
    expected = truth(x.float() * gain.float(), stored) * factor
    expected = expected if bias is None else expected + bias.cpu().double()
    if activation is not None:
        expected = reference.gated(expected, activation)
        residual = None
    else:
        residual = out.copy_(random(rows, made, device=device, seed=4))
        expected = expected + residual.cpu().double()
    inputs, inside = (x, norm) if tile == GEMV else (quantise_rows(x, scheme, norm=norm), None)
    linear(inputs, weight, out, norm=inside, residual=residual, activation=activation, tile=tile)
    close(out, expected)
    assert around[rows:].isnan().all()
    assert around[:, made:].isnan().all()


# A row that is rounded inside the matmul, and those of two tiles.
@covering(1, name=NAMES, rows=[1, 5, 20], dtype=[torch.float16, torch.float32], offset=[0.0, 1.0])
def test_whatever_stands_around_the_matmul_is_what_it_would_be_apart(
    name: str, rows: int, dtype: torch.dtype, offset: float, device: str
) -> None:
    kernels, scheme = FusedKernels(torch.device(device)), SCHEMES[name]
    x, residual = (random(rows, 64, device=device, dtype=dtype, seed=seed) for seed in (0, 1))
    weight, bias = (
        random(64, 64, device=device, dtype=dtype, seed=2) / 8,
        random(64, device=device, dtype=dtype, seed=3),
    )
    norm, post_norm = (Norm(random(64, device=device, dtype=dtype, seed=seed), EPS, offset) for seed in (4, 5))
    stored = quantise(weight, scheme)
    multiply = kernels.linear("qkv", weight, bias, scheme)
    given = x.clone()
    wide = x.cpu().double()
    factor = torch.rsqrt(wide.square().mean(1, keepdim=True) + EPS)
    normed = truth(x.float() * (offset + norm.weight.float()), stored) * factor + bias.cpu().double()
    plain = truth(x, stored, bias)
    behind = reference.rms_norm(plain, post_norm.weight.cpu().double(), EPS, offset)
    close(multiply(x), plain)
    close(multiply(x, norm=norm), normed)
    close(multiply(x, norm=norm, activation="gelu_tanh"), reference.gated(normed, "gelu_tanh"))
    close(multiply(x, residual=residual.clone()), plain + residual.cpu().double())
    close(multiply(x, post_norm=post_norm), behind)
    close(multiply(x, post_norm=post_norm, residual=residual.clone()), behind + residual.cpu().double())
    assert torch.equal(x, given)


@pytest.mark.parametrize("down", ["dense", "w4a16", "w8a8"])
def test_an_mlp_of_two_schemes_leaves_its_activation_to_the_second(
    down: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(w8a8_linear, "prefers_cublas", lambda *of: True)
    kernels, dtype = FusedKernels(torch.device(device)), torch.float32
    x = random(20, 64, device=device, dtype=dtype)
    weight, second = (random(*shape, device=device, dtype=dtype) / 8 for shape in ((128, 64), (32, 64)))
    gate_up = kernels.linear("gate_up", weight, None, SCHEMES["fp8"])
    monkeypatch.setattr(w8a8_linear.FusedW8A8Linear, "_cublas", lambda self, inputs, dtype: dense(inputs, self.weight))
    product = gate_up(x, activation="silu")
    assert isinstance(product, GatedProduct)
    hidden = reference.gated(truth(x, quantise(weight, SCHEMES["fp8"])), "silu")
    monkeypatch.setattr(w8a8_linear, "prefers_cublas", lambda *of: False)
    ours = kernels.linear("down", second, None, SCHEMES[down])(product)
    exact = kernels.linear("down", second, None, SCHEMES[down])(hidden.to(device, dtype))
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=2e-3)


def dense(inputs: object, weight: Weight8) -> Tensor:
    """What cuBLAS returns."""
    x = inputs.values.float() * inputs.scales.t()  # type: ignore[attr-defined]
    return x @ (weight.values.float() * weight.scales.t()).t()


def test_a_row_does_not_depend_on_the_rows_beside_it(device: str) -> None:
    x, weight = random(9, 128, device=device), random(40, 128, device=device, seed=1)
    multiply = FusedKernels(torch.device(device)).linear("o", weight, None, SCHEMES["w8a8"])
    whole = multiply(x)
    assert torch.equal(whole[3:5], multiply(x[3:5]))
    torch.testing.assert_close(whole[:1], multiply(x[:1]), rtol=1e-3, atol=1e-3)


def test_cublas_is_given_what_it_takes(device: str) -> None:
    """Shapes and strides; a CPU's version of the operation checks them, too."""
    weight = random(48, 64, device=device, dtype=torch.bfloat16) / 8
    bias = random(48, device=device, dtype=torch.bfloat16, seed=1)
    multiply = FusedKernels(torch.device(device)).linear("o", weight, bias, SCHEMES["fp8"])
    assert isinstance(multiply, w8a8_linear.FusedW8A8Linear)
    x = random(80, 64, device=device, dtype=torch.float32)
    assert w8a8_tiles.prefers_cublas(80, 48, 64, torch.bfloat16, SCHEMES["fp8"])
    out = multiply._cublas(quantise_rows(x, SCHEMES["fp8"]), torch.bfloat16)
    torch.testing.assert_close(
        out.cpu().double(), truth(x, quantise(weight, SCHEMES["fp8"]), bias), rtol=0.02, atol=0.02
    )


def test_every_shape_gets_a_tile_that_holds_it() -> None:
    for scheme in TESTED:
        for rows in (1, 2, 8, 16, 17, 32, 64, 65, 256, 5000):
            for outputs, columns in ((28672, 4096), (4096, 14336), (960, 576), (576, 1536), (37, 50), (8192, 28672)):
                tile = w8a8_tiles.tile_for(rows, outputs, columns, scheme.group, rows == 1)
                assert tile.gemv == (rows == 1)
                assert not scheme.group or scheme.group % tile.block_k == 0 or tile.gemv
                assert tile.block_n >= (16 if tile.swap else 2)
                whole = w8a8_tiles.whole_tile_for(rows, outputs, scheme.group, rows % 2 == 0)
                assert not scheme.group or scheme.group % whole.block_k == 0
                if not tile.gemv:
                    staged = (w8a8_tiles.block_rows(rows) + tile.block_n) * tile.block_k * tile.stages
                    assert staged <= 227 * 1024
