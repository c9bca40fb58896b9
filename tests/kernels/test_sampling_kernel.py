"""Sampling in Triton chooses what the reference chooses, draws what it should, and each row by itself."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from covering import ALL, covering
from lightllmd.kernels import reference, sampling
from lightllmd.kernels.philox import gumbel
from lightllmd.kernels.sampling_rows import PARAMETERS
from sampling_rows import DEVICE, DRAWN, LIMITED, PENALISED, normal, packed

# numpy, which interprets, tells of each infinity that is dealt with later.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
EOS = [2, 5]
NAN, INF = float("nan"), float("inf")


def sample(
    logits: Tensor,
    rows: list[np.ndarray],
    generated: list[int] | None = None,
    counts: Tensor | None = None,
    masks: Tensor | None = None,
    order: list[int] | None = None,
    raw: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, log-probabilities and `last` of table rows `order` (all of them unless given), on the CPU."""
    table = np.array(rows, PARAMETERS)
    order = list(range(len(rows))) if order is None else order
    counts = torch.zeros((len(rows), logits.shape[1]), dtype=torch.int16) if counts is None else counts
    flags = int(np.bitwise_or.reduce(table["flags"]))
    last = torch.full((len(rows),), -1, dtype=torch.int32, device=DEVICE)
    on_device, there = counts.to(DEVICE), logits.to(DEVICE, copy=True)
    tokens, logprobs, *_ = sampling.sample(
        there,
        torch.from_numpy(table.view(np.int32).reshape(len(rows), -1).copy()).to(DEVICE),
        torch.tensor(order, dtype=torch.int32, device=DEVICE),
        torch.tensor(generated or [0] * len(order), dtype=torch.int32, device=DEVICE),
        on_device,
        torch.tensor(EOS, dtype=torch.int32, device=DEVICE),
        None if masks is None else masks.to(DEVICE),
        last,
        plain=flags == 0 and masks is None,
        search=bool(flags & LIMITED),
        shaped=torch.empty(logits.shape, device=DEVICE) if flags & LIMITED else None,
        raw=raw,
    )
    torch.testing.assert_close(there, logits.to(DEVICE), rtol=0, atol=0, equal_nan=True)  # they are only read
    counts.copy_(on_device)
    return tokens.cpu().long(), logprobs.cpu(), last.cpu().long()


def expected(
    logits: Tensor,
    row: np.ndarray,
    position: int = 0,
    counts: Tensor | None = None,
    allowed: Tensor | None = None,
    raw: bool = False,
) -> tuple[int, float]:
    growth = float(row["decay_factor"]) ** max(0, position - int(row["decay_start"])) - 1
    x = reference.shape(
        logits.clone(),
        torch.zeros_like(logits) if counts is None else counts.float(),
        *(float(row[name]) for name in ("repetition", "frequency", "presence")),
        EOS,
        growth,
        position < int(row["min_new"]) - 1,
        allowed,
        float(row["inverse_temperature"]),
    )
    noise = gumbel(int(row["seed"]), int(row["branch"]), position, len(x)) if row["flags"] & DRAWN else None
    limits = float(row["top_p"]), int(row["top_k"]), float(row["min_p"])
    return reference.choose(x, *limits, noise, logits if raw else x)


def bits(allowed: Tensor) -> Tensor:
    """``[B, V]`` bool as ``[B, ceil(V / 32)]`` int32."""
    rows, vocab = allowed.shape
    wide = torch.zeros((rows, -(-vocab // 32) * 32), dtype=torch.int64)
    wide[:, :vocab] = allowed
    words = (wide.view(rows, -1, 32) << torch.arange(32)).sum(-1)
    return words.where(words < 2**31, words - 2**32).int()


def random_row(draw: random.Random, vocab: int) -> np.ndarray:
    """Any mixture of settings, each off as often as on."""
    drawn = draw.random() < 0.8
    return packed(
        vocab,
        drawn=drawn,
        inverse_temperature=draw.choice([1.0, 3.0, 1 / 1.5]) if drawn else 1.0,
        top_p=draw.choice([2.0, 0.1, 0.5, 0.9]),
        top_k=draw.choice([vocab, 2, 3, 40]),
        min_p=draw.choice([0.0, 0.0, 0.03, 0.4]),
        presence=draw.choice([0.0, 0.0, 1.5]),
        frequency=draw.choice([0.0, 0.0, 0.4]),
        repetition=draw.choice([1.0, 1.0, 1.7]),
        decay_start=2,
        decay_factor=draw.choice([1.0, 1.3]),
        min_new=draw.choice([1, 1, 6]),
        seed=draw.getrandbits(63),
        branch=draw.randrange(4),
    )


@covering(1, masked=[False, True], vocab=[9001, 3000, 50])
def test_every_mixture_of_settings_chooses_what_the_reference_does(masked: bool, vocab: int) -> None:
    """With the log-probabilities of the model, then with those of what is drawn from."""
    draw = random.Random(vocab)
    for trial in range(2):
        raw = trial == 0
        rows = [random_row(draw, vocab) for _ in range(8)]
        order = draw.sample(range(8), k=6)
        generated = [draw.randrange(12) for _ in order]
        logits = normal(6, vocab, seed=trial) * 3
        counts = (torch.rand((8, vocab), generator=torch.Generator().manual_seed(trial)) * 5 - 3).clamp(min=0).short()
        allowed = normal(8, vocab, seed=trial + 9) > -0.5 if masked else None
        truth = [
            expected(logits[at], rows[row], generated[at], counts[row], None if allowed is None else allowed[row], raw)
            for at, row in enumerate(order)
        ]
        before = counts.clone()
        masks = None if allowed is None else bits(allowed)
        tokens, logprobs, last = sample(logits, rows, generated, counts, masks, order, raw)
        assert tokens.tolist() == [token for token, _ in truth]
        assert logprobs.tolist() == pytest.approx([logprob for _, logprob in truth], rel=1e-4, abs=1e-4)
        assert last[order].tolist() == tokens.tolist()
        for at, row in enumerate(order):
            before[row, tokens[at]] += bool(rows[row]["flags"] & PENALISED)
        assert torch.equal(counts, before)


@pytest.mark.parametrize("vocab", [7, 4097])
def test_extreme_logits(vocab: int) -> None:
    equal, one_hot, some, most = (torch.zeros(vocab), torch.zeros(vocab), normal(vocab), torch.full((vocab,), -INF))
    one_hot[-1], some[1:], most[-2] = 400.0, -INF, 3.0
    limits = [
        {},
        {"drawn": True},
        {"drawn": True, "top_k": 3},
        {"drawn": True, "top_p": 0.3},
        {"drawn": True, "top_p": 1e-9, "top_k": 2},
        {"drawn": True, "min_p": 0.5},
        {"drawn": True, "min_p": 1e-40, "top_p": 0.9},
    ]
    rows = [packed(vocab, seed=seed, **limit) for seed, limit in enumerate(limits)]
    for logits in (equal, one_hot, some, most, -1e30 * one_hot, 1e38 * equal):
        tokens, logprobs, _ = sample(logits.expand(len(rows), -1), rows)
        truth = [expected(logits, row) for row in rows]
        assert tokens.tolist() == [token for token, _ in truth]
        assert logprobs.tolist() == pytest.approx([logprob for _, logprob in truth], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("vocab", [50, 9000])
def test_equal_logits_across_a_limit_are_ranked_by_id(vocab: int) -> None:
    draw = random.Random(vocab)
    logits = (normal(12, vocab, seed=1) * 2).round() / 2
    rows = [
        packed(vocab, drawn=True, seed=seed, top_p=draw.choice([2.0, 0.3, 0.77]), top_k=draw.randrange(2, vocab))
        for seed in range(12)
    ]
    tokens, _, _ = sample(logits, rows)
    assert tokens.tolist() == [expected(x, row)[0] for x, row in zip(logits, rows, strict=True)]


@covering(1, other=[{}, {"top_p": 0.6}, {"top_k": 4}, {"top_p": 0.8, "top_k": 30}], vocab=[50, 5000])
def test_min_p_alone_and_beside_each_other_limit_chooses_what_the_reference_does(
    vocab: int, other: dict[str, Any]
) -> None:
    least = [0.0, 0.001, 0.05, 0.3, 0.9, 1.0]
    logits = (normal(1, vocab, seed=2) * 2).expand(len(least), -1)
    for seed in range(2):
        rows = [packed(vocab, drawn=True, seed=seed, min_p=min_p, **other) for min_p in least]
        tokens, logprobs, _ = sample(logits, rows)
        truth = [expected(x, row) for x, row in zip(logits, rows, strict=True)]
        assert tokens.tolist() == [token for token, _ in truth]
        assert logprobs.tolist() == pytest.approx([logprob for _, logprob in truth], rel=1e-5)
        assert tokens[-1] == logits[0].argmax()


def test_min_p_of_one_keeps_the_most_probable_token_and_its_equals_as_they_are_ranked() -> None:
    vocab, equal = 5000, [3, 1030, 4999]
    logits = normal(1, vocab)
    logits[0, equal] = 7.3
    one = {"drawn": True, "inverse_temperature": 0.7, "min_p": 1.0}
    rows = [packed(vocab, seed=seed, **one, top_k=top_k) for top_k in (vocab, 2, 1) for seed in range(10)]
    tokens, _, _ = sample(logits.expand(len(rows), -1), rows)
    assert [set(of.tolist()) for of in tokens.split(10)] == [set(equal), set(equal[:2]), {equal[0]}]


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    logits = torch.zeros(3, 9000)
    logits[0, [8999, 4096]], logits[1, [2049, 1024, 5000]], logits[2, [3, 8191]] = 1.0, 2.0, 3.0
    for row in (packed(9000), packed(9000, presence=1.0), packed(9000, drawn=True, inverse_temperature=1e30)):
        assert sample(logits, [row] * 3)[0].tolist() == [4096, 1024, 3]


def test_logits_that_are_no_numbers_give_such_a_log_probability_and_some_token() -> None:
    vocab = 5000
    limits = ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5})
    rows = [packed(vocab), *(packed(vocab, drawn=True, **limit) for limit in limits)]
    for bad in ([4990], [0], range(vocab)):
        for value in (NAN, -INF if len(bad) == vocab else INF):
            logits = normal(len(rows), vocab)
            logits[:, list(bad)] = value
            tokens, logprobs, _ = sample(logits, rows, raw=value is NAN)
            assert bool(logprobs.isnan().all())
            assert bool(((tokens >= 0) & (tokens < vocab)).all())
    logits = normal(len(rows), vocab)
    good = sample(logits[1:], rows[1:])
    logits[0] = NAN
    both = sample(logits, rows)
    assert torch.equal(both[0][1:], good[0])
    assert torch.equal(both[1][1:], good[1])


def test_a_row_is_the_same_to_the_bit_alone_and_anywhere_in_any_batch() -> None:
    vocab, draw = 6000, random.Random(5)
    rows = [random_row(draw, vocab) for _ in range(7)]
    logits, counts = normal(7, vocab) * 2, (normal(7, vocab, seed=2) > 1).short()
    tokens, logprobs, _ = sample(logits, rows, [4] * 7, counts.clone())
    order = [3, 6, 0, 5]
    some = sample(logits[order], rows, [4] * 4, counts.clone(), order=order)
    assert torch.equal(some[0], tokens[order])
    assert torch.equal(some[1], logprobs[order])
    for row in range(7):
        token, logprob, _ = sample(logits[row : row + 1], rows, [4], counts.clone(), order=[row])
        assert (token[0], logprob[0]) == (tokens[row], logprobs[row])
    for row in range(7):
        token, logprob, _ = sample(logits[row : row + 1], [rows[row]], [4], counts[row : row + 1].clone())
        assert (token[0], logprob[0]) == (tokens[row], logprobs[row])


EACH_LIMIT: list[dict[str, Any]] = [{}, {"top_p": 0.8}, {"top_k": 6}, {"top_p": 0.95, "top_k": 20}, {"min_p": 0.2}]
EVERY_LIMIT: dict[str, Any] = {"top_p": 0.98, "top_k": 14, "min_p": 0.01}


def kept_by(settings: dict[str, Any], logits: Tensor) -> Tensor:
    limits = settings.get("top_p", 2), settings.get("top_k", len(logits)), settings.get("min_p", 0)
    return reference.kept(logits, *limits)


def is_drawn_from(tokens: Tensor, logits: Tensor, settings: dict[str, Any]) -> None:
    """A chi-square test, four standard deviations wide, of ``tokens [draws]`` against what ``logits [V]`` keep."""
    kept = kept_by(settings, logits)
    wanted = logits.double().softmax(-1) * kept
    wanted *= len(tokens) / wanted.sum()
    seen = torch.bincount(tokens, minlength=len(logits))
    assert seen[~kept].sum() == 0
    chi_square = ((seen - wanted)[kept] ** 2 / wanted[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom), (chi_square, freedom)


@pytest.mark.parametrize("settings", [*(EACH_LIMIT if ALL else ()), EVERY_LIMIT], ids=str)
def test_frequencies_are_those_of_the_kept_distribution(settings: dict[str, Any]) -> None:
    vocab, branches = 20, 4
    draws = 20_000 if DEVICE == "cuda" else 120  # the reference makes up for the few of the interpreter
    logits = normal(1, vocab, seed=11) * 1.5
    rows = [packed(vocab, drawn=True, seed=987654321987654321, branch=branch, **settings) for branch in range(branches)]
    order, positions = [at % branches for at in range(draws)], [at // branches for at in range(draws)]
    tokens, logprobs, _ = sample(logits.expand(draws, -1), rows, positions, order=order)
    is_drawn_from(tokens, logits[0], settings)
    torch.testing.assert_close(logprobs, logits[0].log_softmax(-1)[tokens], rtol=1e-5, atol=1e-5)


def test_frequencies_of_the_reference_are_those_of_the_kept_distribution() -> None:
    vocab, draws = 40, 2500
    logits = normal(vocab, seed=11) * 1.5
    noise = torch.stack([gumbel(987654321987654321, 1, position, vocab) for position in range(draws)])
    for settings in ({}, {"top_p": 0.8}, {"top_k": 6}, {"min_p": 0.02}):
        kept = kept_by(settings, logits)
        is_drawn_from((logits + noise).masked_fill(~kept, -INF).argmax(-1), logits, settings)


def test_seed_branch_and_position_each_change_the_draw() -> None:
    vocab = 2000
    base = {"drawn": True, "seed": 2**62 + 3}
    rows = [packed(vocab, **base), packed(vocab, **base, branch=1), packed(vocab, drawn=True, seed=3)]
    tokens = sample(torch.zeros(4, vocab), rows, [7, 7, 7, 8], order=[0, 1, 2, 0])[0].tolist()
    assert len(set(tokens)) == 4
    assert sample(torch.zeros(1, vocab), rows, [7], order=[0])[0].tolist() == tokens[:1]


def test_noise_is_gumbel_distributed_to_its_tails() -> None:
    noise = torch.cat([gumbel(seed, 0, 0, 100_000) for seed in range(5)]).double()
    assert bool(noise.isfinite().all())
    quantiles = torch.tensor([1e-4, 0.01, 0.3, 0.5, 0.9, 0.99, 0.9999, 0.99999], dtype=torch.float64)
    below = (noise[None] < -(-quantiles.log()).log()[:, None]).double().mean(1)
    deviation = (quantiles * (1 - quantiles) / len(noise)).sqrt()
    assert bool(((below - quantiles).abs() < 4 * deviation).all())


def test_counts_stop_at_their_largest_number() -> None:
    vocab = 50
    counts = torch.full((1, vocab), 32767, dtype=torch.int16)
    sample(normal(1, vocab), [packed(vocab, presence=0.5)], counts=counts)
    assert bool((counts == 32767).all())


def test_the_search_ends_when_few_of_many_equal_tokens_are_kept() -> None:
    vocab = 9000
    rows = [packed(vocab, drawn=True, seed=seed, top_k=2) for seed in range(6)]
    tokens, logprobs, _ = sample(torch.zeros(6, vocab), rows)
    assert set(tokens.tolist()) == {0, 1}
    torch.testing.assert_close(logprobs, torch.full((6,), -math.log(vocab)))
