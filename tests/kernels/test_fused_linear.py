"""A GPU's linear computes what the reference says, whichever kernel it chooses and whatever it fuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lightllmd.architecture.schemes import SCHEMES, Scheme
from lightllmd.errors import EngineError
from lightllmd.kernels import fused_linear, reference, tiles
from lightllmd.kernels.fused import FusedKernels
from lightllmd.kernels.linear import Norm

EPS = 1e-5


def random(*shape: int, device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def close(ours: Tensor, truth: Tensor) -> None:
    tolerance = 1e-4 if ours.dtype is torch.float32 else 1e-2
    torch.testing.assert_close(ours, truth.to(ours.dtype), rtol=tolerance, atol=tolerance)


# Rows that stream the weight with the norm inside (1) or apart (3), and those that cuBLAS multiplies (20).
@pytest.mark.parametrize(
    ("rows", "dtype", "biased", "offset"),
    [(1, torch.float16, True, 1.0), (3, torch.float16, False, 0.0), (20, torch.float32, True, 1.0)],
    ids=str,
)
def test_whatever_stands_around_the_matmul_is_what_it_would_be_apart(
    rows: int, dtype: torch.dtype, biased: bool, offset: float, device: str
) -> None:
    x, residual = (random(rows, 48, device=device, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = random(48, 48, device=device, dtype=dtype, seed=2) / 7
    bias = random(48, device=device, dtype=dtype, seed=3) if biased else None
    norm, post_norm = (Norm(random(48, device=device, dtype=dtype, seed=seed), EPS, offset) for seed in (4, 5))
    assert tiles.prefers(rows, 48, 48, dtype, False) == (dtype is torch.float16)
    linear = FusedKernels(torch.device(device)).linear("qkv", weight, bias)
    given = x.clone()
    wide = [tensor.float() for tensor in (x, weight)] + [None if bias is None else bias.float()]
    plain = reference.linear(*wide)
    normed = reference.linear(reference.rms_norm(wide[0], norm.weight.float(), EPS, offset), *wide[1:])
    behind = reference.rms_norm(plain, post_norm.weight.float(), EPS, offset)
    close(linear(x), plain)
    close(linear(x, norm=norm), normed)
    close(linear(x, norm=norm, activation="gelu_tanh"), reference.gated(normed, "gelu_tanh"))
    close(linear(x, residual=residual.clone()), plain + residual.float())
    close(linear(x, post_norm=post_norm), behind)
    close(linear(x, post_norm=post_norm, residual=residual.clone()), behind + residual.float())
    assert torch.equal(x, given)


@pytest.mark.parametrize(("rows", "biased"), [(7, True), (40, False), (45, True), (200, False)])
def test_matmuls_in_chunks_of_rows_are_those_of_the_whole(
    rows: int, biased: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_linear, "CHUNK", 16)
    monkeypatch.setattr(fused_linear, "CHUNKED", range(20, 100))
    dtype = torch.float32
    x, weight = random(rows, 32, device=device, dtype=dtype), random(48, 32, device=device, dtype=dtype, seed=1)
    bias = random(48, device=device, dtype=dtype, seed=2) if biased else None
    residual = random(rows, 48, device=device, dtype=dtype, seed=3)
    linear = FusedKernels(torch.device(device)).linear("out", weight, bias)
    close(linear(x), reference.linear(x, weight, bias))
    close(linear(x, residual=residual.clone()), reference.linear(x, weight, bias, residual))


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float16), (2, torch.float16), (2, torch.float32)], ids=str)
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_logits_are_fp32_sums_and_capped(rows: int, dtype: torch.dtype, soft_cap: float | None, device: str) -> None:
    hidden, weight = random(rows, 48, device=device, dtype=dtype), random(70, 48, device=device, dtype=dtype, seed=1)
    norm = Norm(random(48, device=device, dtype=dtype, seed=2), EPS)
    head = FusedKernels(torch.device(device)).head(weight, norm, tied=False, soft_cap=soft_cap)
    logits = head.logits(hidden)
    truth = reference.linear(reference.rms_norm(hidden.float(), norm.weight.float(), EPS), weight.float())
    assert logits.dtype is torch.float32
    torch.testing.assert_close(
        logits, truth if soft_cap is None else reference.soft_cap(truth, soft_cap), rtol=5e-3, atol=5e-3
    )


def test_what_lies_on_the_device_may_be_freed_and_filled_again_in_place(device: str) -> None:
    dtype = torch.float32
    x, weight = random(3, 32, device=device, dtype=dtype), random(48, 32, device=device, dtype=dtype, seed=1)
    linear = FusedKernels(torch.device(device)).linear("down", weight, random(48, device=device, dtype=dtype))
    before, stored = linear(x), linear.tensors()
    assert list(stored) == ["weight", "bias"]
    copies = {name: tensor.clone() for name, tensor in stored.items()}
    for tensor in stored.values():
        tensor.untyped_storage().resize_(0)
    for name, tensor in stored.items():
        tensor.untyped_storage().resize_(copies[name].nbytes)
        tensor.copy_(copies[name])
    assert torch.equal(linear(x), before)


def test_a_scheme_that_is_not_built_is_refused_by_name(device: str) -> None:
    kernels, weight = FusedKernels(torch.device(device)), torch.zeros(4, 4, device=device)
    with pytest.raises(EngineError, match="qkv: this device has no kernels for weights stored as 'int3'"):
        kernels.linear("qkv", weight, None, Scheme("int3", values="int8"))  # type: ignore[arg-type]


def test_a_linear_holds_what_its_scheme_says(device: str) -> None:
    """The memory budget counts by the scheme."""
    kernels, weight = FusedKernels(torch.device(device)), torch.zeros(6, 4, dtype=torch.float16, device=device)
    for scheme in SCHEMES.values():
        held = kernels.linear("qkv", weight, None, scheme).tensors()
        assert tuple(held) == scheme.tensors
        assert sum(tensor.nbytes for tensor in held.values()) == scheme.nbytes((6, 4), 2)
