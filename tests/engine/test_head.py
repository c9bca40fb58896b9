"""The logits behind the last layer."""

from __future__ import annotations

import pytest
import torch

from lightllmd.kernels import eager_ops
from lightllmd.kernels.devices import kernels_for
from lightllmd.kernels.linear import Norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_close_race_for_the_next_token_is_decided_in_fp32(dtype: torch.dtype) -> None:
    """Best logits a thousandth apart, where the 16-bit product of their size can't tell them."""
    torch.manual_seed(3)
    hidden, vocab = 64, 5000
    x = torch.randn(8, hidden).to(dtype)
    weight = (torch.randn(vocab, hidden) * 0.05).to(dtype)
    norm = torch.ones(hidden, dtype=dtype)
    kernels = kernels_for(torch.device("cpu"), dtype)
    direction = eager_ops.rms_norm(x, norm, 1e-5)
    for row in range(8):  # two tokens for each row that all but tie, far above the others
        for place in range(2):
            weight[100 * row + place] = direction[row] * 0.4
        weight[100 * row + 1, row] += 0.002
    exact = direction.float() @ weight.float().T
    head = kernels.head(weight, Norm(norm, 1e-5), tied=True)
    logits = head.logits(x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits.argmax(-1), exact.argmax(-1))
    best = exact.topk(4).indices
    torch.testing.assert_close(logits.gather(-1, best), exact.gather(-1, best), rtol=1e-6, atol=1e-5)
