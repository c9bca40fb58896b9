"""Long products are the same in pieces."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lightllmd.kernels import fused, reference
from lightllmd.kernels.linear import DenseLinear


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [7, 40, 45, 200])
def test_products_in_pieces_are_those_of_the_whole(
    rows: int, biased: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "PIECE", 16)
    monkeypatch.setattr(fused, "PIECED", range(20, 100))
    kernels = fused.FusedKernels(torch.device(device), torch.float32)
    x, weight = torch.randn(rows, 32, device=device), torch.randn(48, 32, device=device)
    bias = torch.randn(48, device=device) if biased else None
    norm, residual = torch.rand(32, device=device), torch.randn(rows, 48, device=device)
    linear = DenseLinear(weight, bias)
    truth = reference.linear(reference.rms_norm(x, norm, 1e-5), weight, bias)
    torch.testing.assert_close(kernels.normed_product(x, norm, 1e-5, linear), truth, rtol=1e-4, atol=1e-4)
    added = kernels.add_product(x, linear, residual.clone())
    torch.testing.assert_close(added, reference.linear(x, weight, bias, residual), rtol=1e-4, atol=1e-4)
