"""A dense weight becomes a quantised one in chunks of rows, with as little memory beside it as possible."""

from __future__ import annotations

import pytest
import torch

from lightllmd.architecture.schemes import SCHEMES, Scheme, scheme_of
from lightllmd.kernels import quantised
from lightllmd.kernels.quantised import QuantisedMatrix, quantise

QUANTISED = [scheme for scheme in [*SCHEMES.values(), scheme_of("w4a16", 32)] if not scheme.dense]


def held(matrix: QuantisedMatrix) -> list[torch.Tensor]:
    found = [matrix.values, matrix.scales, matrix.zeros]
    return [tensor.contiguous().view(torch.uint8) for tensor in found if tensor is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", QUANTISED, ids=lambda scheme: f"{scheme.name}-{scheme.group}")
def test_chunks_of_rows_make_no_difference(scheme: Scheme, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn((301, 210), generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[7] = 0
    before = weight.clone()
    whole = quantise(weight, scheme)
    monkeypatch.setitem(quantised.CHUNK_ELEMENTS, "cpu", 1000)
    for ours, theirs in zip(held(quantise(weight, scheme)), held(whole), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(weight, before)
    assert whole.dense(torch.float32)[7].abs().max() == 0
    error = (whole.dense(torch.float32) - weight.float()).abs().amax() / weight.float().abs().amax()
    assert error < 0.15


@pytest.mark.parametrize("scheme", QUANTISED, ids=lambda scheme: f"{scheme.name}-{scheme.group}")
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_leaves_a_scale_that_is_none(scheme: Scheme, broken: float) -> None:
    """Integers know no NaN: without that, damage would be served as if it were weights."""
    weight = torch.randn((8, 64), generator=torch.Generator().manual_seed(0))
    weight[3, 40] = broken
    matrix = quantise(weight, scheme)
    assert not matrix.scales.isfinite().all()
    assert not matrix.dense(torch.float32)[3].isfinite().all()
