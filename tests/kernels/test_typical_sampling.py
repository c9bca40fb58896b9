"""Typical-p in Triton chooses what the reference chooses, beside any other limit, and leaves other rows alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lightllmd.kernels import reference, sampling
from lightllmd.kernels.philox import gumbel
from lightllmd.kernels.sampling_rows import PARAMETERS
from lightllmd.kernels.sampling_rows import TYPICAL as TYPICAL_FLAG
from sampling_rows import DEVICE, DRAWN, LIMITED, PENALISED, normal, packed

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TYPICAL = TYPICAL_FLAG.value


def typical_row(vocab: int, typical_p: float, **settings: Any) -> np.ndarray:
    row = packed(vocab, drawn=True, **settings)
    if typical_p < 1:
        row["flags"] |= TYPICAL | LIMITED
    return row


def sample(
    logits: Tensor, rows: list[np.ndarray], typical_p: list[float], counts: Tensor | None = None, raw: bool = False
) -> tuple[list[int], list[float], list[int]]:
    """Tokens, log-probabilities and the newest tokens of all rows; `counts` are changed."""
    table = np.array(rows, PARAMETERS)
    size = len(rows)
    counts = torch.zeros(logits.shape, dtype=torch.int16) if counts is None else counts
    on_device, there = counts.to(DEVICE), logits.to(DEVICE, copy=True)
    last = torch.full((size,), -1, dtype=torch.int32, device=DEVICE)
    order = torch.arange(size, dtype=torch.int32, device=DEVICE)
    tokens, logprobs, *_ = sampling.sample(
        there,
        torch.from_numpy(table.view(np.int32).reshape(size, -1).copy()).to(DEVICE),
        order,
        torch.full((size,), 3, dtype=torch.int32, device=DEVICE),
        on_device,
        torch.tensor([2, 5], dtype=torch.int32, device=DEVICE),
        None,
        last,
        plain=False,
        search=True,
        shaped=torch.empty(logits.shape, device=DEVICE),
        raw=raw,
        typical=torch.tensor(typical_p, dtype=torch.float32, device=DEVICE),
    )
    assert torch.equal(there.cpu(), logits)
    counts.copy_(on_device)
    return tokens.tolist(), logprobs.tolist(), last.tolist()


def expected(logits: Tensor, row: np.ndarray, typical_p: float, counts: Tensor, raw: bool) -> tuple[int, float]:
    penalties = (float(row[name]) for name in ("repetition", "frequency", "presence"))
    x = reference.shape(
        logits.clone(), counts.float(), *penalties, [], 0.0, False, None, float(row["inverse_temperature"])
    )
    noise = gumbel(int(row["seed"]), int(row["branch"]), 3, len(x)) if row["flags"] & DRAWN else None
    limits = float(row["top_p"]), int(row["top_k"]), float(row["min_p"])
    return reference.choose(x, *limits, noise, logits if raw else x, typical_p)


@pytest.mark.parametrize("vocab", [3000, 50])
def test_typical_p_beside_every_other_limit_chooses_what_the_reference_does(vocab: int) -> None:
    draw = random.Random(vocab)
    for trial in range(2):
        raw = trial == 0
        masses = [draw.choice([1.0, 0.05, 0.2, 0.5, 0.9, 0.99]) for _ in range(10)]
        rows = [
            typical_row(
                vocab,
                mass,
                inverse_temperature=draw.choice([1.0, 3.0, 1 / 1.5]),
                top_p=draw.choice([2.0, 2.0, 0.3, 0.9]),
                top_k=draw.choice([vocab, vocab, 2, 40]),
                min_p=draw.choice([0.0, 0.0, 0.05]),
                presence=draw.choice([0.0, 0.0, 1.5]),
                repetition=draw.choice([1.0, 1.0, 1.7]),
                seed=draw.getrandbits(63),
                branch=draw.randrange(4),
            )
            for mass in masses
        ]
        logits = normal(10, vocab, seed=trial) * torch.linspace(0.3, 5, 10)[:, None]
        counts = (normal(10, vocab, seed=trial + 5) > 1).short()
        truth = [expected(*each, raw) for each in zip(logits, rows, masses, counts, strict=True)]
        before = counts.clone()
        tokens, logprobs, last = sample(logits, rows, masses, counts, raw)
        assert tokens == last == [token for token, _ in truth]
        assert logprobs == pytest.approx([logprob for _, logprob in truth], rel=1e-4, abs=1e-4)
        for row, token in enumerate(tokens):
            before[row, token] += bool(rows[row]["flags"] & PENALISED)
        assert torch.equal(counts, before)


def test_where_the_limits_have_no_token_in_common_typical_p_does_not_count() -> None:
    vocab = 3000
    logits = torch.zeros(1, vocab)
    logits[0, 7] = 6.0
    rows = [typical_row(vocab, 0.3, top_k=top_k, seed=seed) for top_k in (1, 2, vocab) for seed in range(4)]
    tokens, _, _ = sample(logits.expand(12, -1), rows, [0.3] * 12)
    assert tokens[:4] == [7] * 4
    assert tokens[4:8] == [0] * 4
    assert 7 not in tokens[8:]


def test_equal_and_impossible_tokens_end_the_search() -> None:
    vocab = 3000
    some = torch.full((vocab,), float("-inf"))
    some[[4, 2000]] = torch.tensor([1.0, 3.0])
    for logits in (torch.zeros(vocab), some):
        rows = [typical_row(vocab, mass, seed=seed) for mass in (1e-6, 0.5, 0.999999) for seed in range(2)]
        masses = [1e-6, 1e-6, 0.5, 0.5, 0.999999, 0.999999]
        tokens, logprobs, _ = sample(logits.expand(6, -1), rows, masses)
        nothing = torch.zeros(vocab)
        truth = [expected(logits, row, mass, nothing, False) for row, mass in zip(rows, masses, strict=True)]
        assert tokens == [token for token, _ in truth]
        assert logprobs == pytest.approx([logprob for _, logprob in truth], abs=1e-5)


def test_logits_that_are_no_numbers_give_such_a_log_probability() -> None:
    logits = normal(2, 2000)
    logits[0, 5] = float("nan")
    rows = [typical_row(2000, 0.5, seed=1)] * 2
    tokens, logprobs, _ = sample(logits.nan_to_num(float("inf")), rows, [0.5] * 2)
    assert logprobs[0] != logprobs[0]
    assert tokens[1] == expected(logits[1], rows[1], 0.5, torch.zeros(2000), False)[0]
