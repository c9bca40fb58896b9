"""Which rows go through cuDNN, and that it computes what the truth says."""

from __future__ import annotations

import pytest
import torch

from lightllmd.kernels import reference
from lightllmd.kernels.layout import Heads, Span
from lightllmd.kernels.whole_prompts import LEAST, STEP, WORTH, attend, plan, spans


def test_only_planned_lengths_and_little_padding_are_used() -> None:
    assert spans([LEAST], [0], 0, 0) == {}
    assert spans([100, LEAST], [0, 0], 7, LEAST) == {1: Span(107, 1, LEAST, LEAST)}
    assert spans([LEAST] * 4, [0] * 4, 0, 9000, [True, True, False, True]).keys() == {0, 3}
    assert spans([LEAST], [5], 0, 9000) == {}, "behind a cached prefix the cache must be read"
    for count in range(1, 10_000, 7):
        for span in spans([count], [0], 3, 8 * STEP).values():
            assert LEAST <= span.padded <= min(8 * STEP, WORTH * count)
            assert span.padded % STEP == 0
    assert not spans([8 * STEP + 1], [0], 0, 8 * STEP)


def test_equal_rows_go_together_and_no_token_is_in_two_spans() -> None:
    counts = [LEAST] * 7 + [300, LEAST, LEAST, 5000]
    found = spans(counts, [0] * len(counts), 10, 8 * LEAST)
    assert [span.rows for span in found.values()] == [4, 2, 1, 2, 1]
    for index, span in found.items():
        assert span.first == 10 + sum(counts[:index])
        assert counts[index : index + span.rows] == [span.count] * span.rows
    assert all(span.rows == 1 for span in spans(counts, [0] * len(counts), 0, 5000).values() if span.count != LEAST)


def test_without_a_gpu_nothing_is_planned() -> None:
    assert plan([Heads(4, 2, 64, 0.1, 1e-5)], torch.bfloat16, torch.device("cpu"), 4096) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("count", [LEAST, 2900])
def test_whole_rows_have_the_attention_of_the_truth(count: int) -> None:
    heads = Heads(8, 2, 128, 128**-0.5, 1e-5)
    rows = 2 if count == LEAST else 1
    qkv = torch.randn(5 + rows * count, 12, 128, device="cuda", dtype=torch.bfloat16)
    out = attend(qkv, heads, Span(5, rows, count, -(-count // STEP) * STEP)).unflatten(0, (rows, count))
    for row in range(rows):
        part = qkv[5 + row * count : 5 + (row + 1) * count]
        truth = reference.attention(part[:, :8], part[:, 8:], torch.arange(count, device="cuda"), heads.scale)
        torch.testing.assert_close(out[row], truth, rtol=2e-2, atol=2e-2)
