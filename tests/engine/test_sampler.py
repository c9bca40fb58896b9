"""The sampler against a plain Python reading of the specification, and against what a distribution must look like."""

from __future__ import annotations

import math
import random
import struct
from typing import Any

import pytest
import torch
from transformers import TypicalLogitsWarper

from lightllmd.engine.sampling.cpu_sampler import Sampler, draw, typical
from lightllmd.engine.step import SamplingRow
from lightllmd.ipc.messages import SamplingParams
from lightllmd.kernels import reference
from lightllmd.kernels.philox import gumbel

VOCAB, EOS = 97, [2, 5]


def sampler(vocab: int = VOCAB, rows: int = 8, *, processed: bool = False) -> Sampler:
    return Sampler(rows, 64, vocab, EOS, torch.device("cpu"), processed=processed)


def brute(
    logits: list[float],
    params: SamplingParams,
    prompt: list[int],
    emitted: list[int],
    branch: int = 0,
    allowed: set[int] | None = None,
    processed: bool = False,
) -> tuple[int, float]:
    """One row, step by step as the specification says it. Returns (token, log-probability): the model's, or that of the
    `processed` row."""
    row, position = list(logits), len(emitted)
    for token, added in params.logit_bias.items():
        row[token] += added
    counted = (prompt if params.input_penalty else []) + emitted
    for token in set(counted):
        value = row[token]
        value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        row[token] = value - counted.count(token) * params.frequency_penalty - params.presence_penalty
    start, factor = params.exponential_decay_length_penalty
    for eos in EOS:
        row[eos] += abs(row[eos]) * (factor ** max(position - start, 0) - 1)
        if position < params.min_new_tokens - 1:
            row[eos] = -1e6
    if allowed is not None:
        row = [value if token in allowed else -math.inf for token, value in enumerate(row)]
    greedy = not params.do_sample or params.temperature < 1e-5
    if not greedy:
        row = [value / params.temperature for value in row]
    highest = max(row)
    total = highest + math.log(sum(math.exp(value - highest) for value in row))
    raw_total = max(logits) + math.log(sum(math.exp(value - max(logits)) for value in logits))
    told = [value - total for value in row] if processed else [value - raw_total for value in logits]
    if greedy:
        token = row.index(highest)
        return token, told[token]
    ranked = sorted(range(len(row)), key=lambda token: (-row[token], token))
    kept: list[int] = []
    mass = 0.0
    for rank, token in enumerate(ranked):
        probability = math.exp(row[token] - total)
        if mass > params.top_p or (params.top_k > 0 and rank >= params.top_k):
            break
        if probability < params.min_p * math.exp(highest - total):
            break
        kept.append(token)
        mass += probability
    typical = typical_tokens([value - total for value in row], params.typical_p)
    kept = [token for token in kept if token in typical] or kept
    noise = gumbel(params.seed, branch, position, len(row)).tolist()
    token = max(kept, key=lambda one: row[one] + noise[one])
    return token, told[token]


def typical_tokens(logprobs: list[float], mass: float) -> set[int]:
    """Meister et al. 2023, "Locally typical sampling"."""
    entropy = -sum(math.exp(logprob) * logprob for logprob in logprobs if logprob > -math.inf)
    kept, total = set(), 0.0
    for token in sorted(range(len(logprobs)), key=lambda token: abs(-logprobs[token] - entropy)):
        if total >= mass:
            break
        kept.add(token)
        total += math.exp(logprobs[token])
    return kept


def random_params(draw_: random.Random) -> SamplingParams:
    """Any mixture of settings, each off as often as on."""
    changes: dict[str, Any] = {
        "do_sample": draw_.random() < 0.8,
        "temperature": draw_.choice([1.0, 0.3, 0.7, 1.5, 1e-6]),
        "top_p": draw_.choice([1.0, 0.1, 0.5, 0.9]),
        "top_k": draw_.choice([-1, 1, 3, 40, 200]),
        "min_p": draw_.choice([0.0, 0.0, 0.03, 0.4]),
        "typical_p": draw_.choice([1.0, 1.0, 0.1, 0.5, 0.9]),
        "presence_penalty": draw_.choice([0.0, 0.0, 1.5]),
        "frequency_penalty": draw_.choice([0.0, 0.0, 0.4]),
        "repetition_penalty": draw_.choice([1.0, 1.0, 1.7]),
        "exponential_decay_length_penalty": draw_.choice([(1, 1.0), (2, 1.3)]),
        "input_penalty": draw_.random() < 0.5,
        "min_new_tokens": draw_.choice([1, 1, 6]),
        "seed": draw_.getrandbits(63),
        "logit_bias": draw_.choice([{}, {}, {7: 4.0, 2: -100.0, 96: 2.5}, {5: 100.0}]),
    }
    return SamplingParams(max_new_tokens=40, **changes)


def mask_of(allowed: set[int], vocab: int = VOCAB) -> bytes:
    """As Step.masks; bits beyond the vocabulary mean nothing."""
    words = [0] * -(-vocab // 32)
    for token in {*allowed, vocab + 1}:
        words[token // 32] |= 1 << token % 32
    return struct.pack(f"<{len(words)}I", *words)


@pytest.mark.parametrize("processed", [False, True])
def test_every_mixture_of_parameters_follows_the_specification(processed: bool) -> None:
    draw_ = random.Random(0)
    for trial in range(40):
        many = sampler(processed=processed)
        rows = draw_.sample(range(8), k=6)
        logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(trial)) * 3
        expected, positions = [], []
        for index, row in enumerate(rows):
            params = random_params(draw_)
            prompt = draw_.choices(range(VOCAB), k=5)
            emitted = draw_.choices(range(12), k=draw_.randrange(10))
            asked = prompt if params.input_penalty else []
            many.enter(row, SamplingRow(params, asked, emitted), branch=index)
            allowed = draw_.choice([None, None, {5}, {2, 31, 32, 96}, set(range(0, VOCAB, 3))])
            many.restrict({row: b"" if allowed is None else mask_of(allowed)})
            positions.append(len(emitted))
            row_logits = logits[index].double().tolist()
            expected.append(brute(row_logits, params, prompt, emitted, index, allowed, processed))
        tokens, logprobs, *_ = many.sample(logits, rows, positions)
        assert tokens.tolist() == [token for token, _ in expected], trial
        assert logprobs.tolist() == pytest.approx([logprob for _, logprob in expected], rel=1e-4, abs=1e-4)


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    draw_ = random.Random(3)
    params = [random_params(draw_) for _ in range(8)]
    logits = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    together = sampler()
    for row in range(8):
        together.enter(row, SamplingRow(params[row], [], [7, 7, 9]), row)
    tokens, logprobs, *_ = together.sample(logits.clone(), list(range(8)), [3] * 8)
    for row in range(8):
        alone = sampler()
        alone.enter(0, SamplingRow(params[row], [], [7, 7, 9]), row)
        token, logprob, *_ = alone.sample(logits[row : row + 1].clone(), [0], [3])
        assert token.item() == tokens[row].item()
        assert logprob.item() == pytest.approx(logprobs[row].item(), abs=1e-5)


def test_penalties_go_on_after_a_pause_as_without_one() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.7, repetition_penalty=1.3, input_penalty=True)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(4))
    unbroken, resumed, prompt, emitted = sampler(), sampler(), [9, 9, 12], []
    unbroken.enter(0, SamplingRow(params, prompt, []), 0)
    for position in range(12):
        token = unbroken.sample(logits.clone(), [0], [position])[0].tolist()
        unbroken.record([0], token)
        emitted += token
    resumed.enter(3, SamplingRow(params, prompt, emitted[:8]), 0)
    for position in range(8, 12):
        token = resumed.sample(logits.clone(), [3], [position])[0].tolist()
        resumed.record([3], token)
        assert token == [emitted[position]]


def test_a_reused_row_remembers_nothing_of_its_former_owner() -> None:
    of_two, fresh = sampler(), sampler()
    of_two.enter(0, SamplingRow(SamplingParams(presence_penalty=50.0), [], [1, 2, 3]), 0)
    of_two.record([0], [4])
    for one in (of_two, fresh):
        one.enter(0, SamplingRow(SamplingParams(presence_penalty=0.1), [], []), 0)
    logits = torch.randn(1, VOCAB)
    results = [one.sample(logits.clone(), [0], [0]) for one in (of_two, fresh)]
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_eos_may_be_the_token_at_min_new_tokens_and_not_before() -> None:
    one = sampler()
    one.enter(0, SamplingRow(SamplingParams(min_new_tokens=3, max_new_tokens=9), [], []), 0)
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS[1]], logits[0, 50] = 10.0, 5.0
    chosen = [one.sample(logits.clone(), [0], [position])[0].item() for position in range(4)]
    assert chosen == [50, 50, EOS[1], EOS[1]]


CHANGED = SamplingParams(
    do_sample=True, temperature=0.5, top_k=1, top_logprobs=4, presence_penalty=1.5, logit_bias={9: 2.0}
)


def changed(logits: torch.Tensor) -> torch.Tensor:
    """What `CHANGED` makes of ``logits [V]`` behind token 11."""
    logits = logits.clone()
    logits[9] += 2.0
    logits[11] -= 1.5
    return logits / 0.5


@pytest.mark.parametrize("processed", [False, True])
def test_log_probabilities_are_the_models_unless_the_processed_ones_are_asked_for(processed: bool) -> None:
    """Of the token, of its alternatives, and of those that a mask forbids."""
    one = sampler(processed=processed)
    one.enter(0, SamplingRow(CHANGED, [], [11]), 0)
    one.enter(1, SamplingRow(SamplingParams(), [], []), 0)
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(8))
    tokens, logprobs, alternatives, candidates = one.sample(logits.clone(), [0, 1], [1, 0])
    assert tokens[0] == changed(logits[0]).argmax()
    truth = (changed(logits[0]) if processed else logits[0]).log_softmax(-1)
    best = truth.topk(4)
    assert logprobs[0].item() == pytest.approx(truth[tokens[0]].item(), abs=1e-5)
    assert alternatives[1] is None
    assert alternatives[0] is not None
    assert [token for token, _ in alternatives[0]] == best.indices.tolist()
    assert [value for _, value in alternatives[0]] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert candidates == [None, None]
    one.restrict({0: mask_of({3, 64, 96})})
    _, _, (masked, _), _ = one.sample(logits.clone(), [0, 1], [1, 0])
    assert ({token for token, _ in masked or ()} == {3, 64, 96}) is processed
    assert (masked == alternatives[0]) is not processed


@pytest.mark.parametrize("processed", [False, True])
def test_candidates_are_of_what_is_searched_and_have_the_log_probabilities_that_are_told(processed: bool) -> None:
    one, logits = sampler(processed=processed), torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(8))
    one.enter(0, SamplingRow(SamplingParams(candidates=64, presence_penalty=2.0), [], [64]), 0)
    one.restrict({0: mask_of({3, 64, 96})})
    (found,) = one.sample(logits.clone(), [0], [1]).candidates
    changed = logits[0].clone()
    changed[64] -= 2.0
    allowed = changed[[3, 64, 96]].log_softmax(-1)
    searched = dict(zip((3, 64, 96), allowed.tolist(), strict=True))
    assert found is not None
    assert {token: value for token, value, _ in found} == pytest.approx(searched, abs=1e-5)
    assert (
        [value for _, value, _ in found]
        == sorted(searched.values(), reverse=True)
        == pytest.approx(sorted(allowed.tolist(), reverse=True))
    )
    told = searched if processed else dict(enumerate(logits[0].log_softmax(-1).tolist()))
    assert [value for *_, value in found] == pytest.approx([told[token] for token, *_ in found], abs=1e-5)
    one.restrict({0: b""})
    assert len(one.sample(logits.clone(), [0], [1]).candidates[0] or ()) == 64


def test_a_mask_and_a_bias_end_with_their_row() -> None:
    one, logits = sampler(), torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(6))
    one.enter(0, SamplingRow(SamplingParams(logit_bias={4: 50.0}), [], []), 0)
    assert one.sample(logits.clone(), [0], [0])[0].tolist() == [4]
    one.restrict({0: mask_of({7, 8})})
    assert one.sample(logits.clone(), [0], [1])[0].item() in (7, 8)
    one.enter(0, SamplingRow(SamplingParams(), [], []), 0)
    tokens, logprobs, *_ = one.sample(logits.clone(), [0], [0])
    assert tokens.tolist() == [logits.argmax().item()]
    assert logprobs.tolist() == pytest.approx([logits.log_softmax(-1).max().item()], abs=1e-5)


@pytest.mark.parametrize("vocab", [50, 1500, 5000])
@pytest.mark.parametrize("levels", [0, 7])  # 7: few distinct values, so that equal ones lie across every border
def test_truncation_by_parts_equals_a_full_sort(vocab: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(vocab + levels)
    logits = torch.randn(40, vocab, generator=generator) * 0.5
    if levels:
        logits = (logits * levels).round() / levels
    logprobs = logits.log_softmax(-1)
    top_p = torch.rand(40, generator=generator).double()
    top_k = torch.randint(1, vocab + 1, (40,), generator=generator).double()
    top_p[:10], top_k[10:20] = 1.0, vocab
    min_p = torch.rand(40, generator=generator).double() * (torch.arange(40) % 2)
    top_p[0:4], top_k[0:4] = 1.0, vocab
    min_p[2], min_p[3] = 0.0, 1.0
    noise = torch.stack([gumbel(vocab, 0, row, vocab) for row in range(40)])
    tokens = draw(logprobs, top_p, top_k, min_p, noise)
    for row in range(40):
        values, ids = logprobs[row].exp().double().sort(dim=-1, descending=True, stable=True)
        kept = ((values.cumsum(-1) - values) <= top_p[row]) & (torch.arange(vocab) < top_k[row])
        kept &= values >= min_p[row] * values[0]
        sums = (logprobs + noise)[row, ids[kept]]
        assert tokens[row] == ids[kept][sums.argmax()]


def test_rounding_hardly_ever_changes_a_draw() -> None:
    """Else a stream that is replayed would go on otherwise: the errors of two ways to compute the same logits."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 20_000, generator=generator) * 2  # a draw is one of hundreds of likely tokens
    others = logits + torch.randn(logits.shape, generator=generator) * 1e-4
    noise = torch.stack([gumbel(1, 0, row, 20_000) for row in range(400)])
    for top_p in (1.0, 0.95):
        limits = torch.full((400,), top_p).double(), torch.full((400,), 20_000.0), torch.zeros(400)
        first, second = (draw(one.log_softmax(-1), *limits, noise) for one in (logits, others))
        assert int((first != second).sum()) <= 1


@pytest.mark.parametrize(
    "limits",
    [{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.2}, {"temperature": 0.6, "top_p": 0.95, "top_k": 7, "min_p": 0.02}],
    ids=str,
)
def test_frequencies_are_those_of_the_truncated_distribution(limits: dict[str, Any]) -> None:
    vocab, draws = 12, 8000
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(11)) * 1.5
    one = sampler(vocab)
    params = SamplingParams(do_sample=True, seed=123456789, max_new_tokens=draws, **limits)
    one.enter(0, SamplingRow(params, [], []), 0)
    counts = torch.zeros(vocab)
    for first in range(0, draws, 1000):
        positions = list(range(first, first + 1000))
        tokens = one.sample(logits.expand(1000, -1).clone(), [0] * 1000, positions)[0]
        counts += torch.bincount(tokens, minlength=vocab)
    probabilities = (logits[0] / params.temperature).double().softmax(-1)
    values, ids = probabilities.sort(descending=True)
    kept = ((values.cumsum(-1) - values) <= params.top_p) & (
        torch.arange(vocab) < (params.top_k if params.top_k > 0 else vocab)
    )
    kept &= values >= params.min_p * values[0]
    expected = torch.zeros(vocab, dtype=torch.float64)
    expected[ids] = values * kept
    expected *= draws / expected.sum()
    assert counts[expected == 0].sum() == 0
    seen = expected > 0
    chi_square = ((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum().item()
    freedom = int(seen.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom), (chi_square, freedom)


@pytest.mark.parametrize("mass", [0.05, 0.2, 0.5, 0.95, 0.999])
def test_typical_p_keeps_what_transformers_keeps(mass: float) -> None:
    logits = torch.randn(20, 500, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.1, 6, 20)[:, None]
    theirs = TypicalLogitsWarper(mass=mass)(torch.zeros(20, 1, dtype=torch.long), logits.clone()) > float("-inf")
    assert torch.equal(typical(logits.log_softmax(-1), torch.full((20,), mass)), theirs)
    for row, kept in zip(logits, theirs, strict=True):
        assert torch.equal(reference.typical(row, mass), kept)


def test_typical_p_does_not_count_where_the_other_limits_leave_no_typical_token() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 3] = 4.0  # a third of the mass: the others are the typical ones
    one = sampler()
    for row, top_k in enumerate((1, 2, -1)):
        params = SamplingParams(do_sample=True, seed=5, typical_p=0.3, top_k=top_k)
        one.enter(row, SamplingRow(params, [], []), 0)
    for row, kept in ((0, {3}), (1, {0}), (2, set(range(VOCAB)) - {3})):
        tokens = one.sample(logits.expand(60, -1).clone(), [row] * 60, list(range(60)))[0]
        assert set(tokens.tolist()) <= kept


def test_min_p_of_one_keeps_the_most_probable_token_and_its_equals_as_they_are_ranked() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(5))
    logits[0, [7, 30, 90]] = 6.1
    one = sampler()
    for row, top_k in enumerate((-1, 2, 1)):
        params = SamplingParams(do_sample=True, temperature=0.7, seed=3, min_p=1.0, top_k=top_k)
        one.enter(row, SamplingRow(params, [], []), 0)
        tokens = one.sample(logits.expand(40, -1).clone(), [row] * 40, list(range(40)))[0]
        assert set(tokens.tolist()) == {7, 30, 90} - ({90} if row else set()) - ({30} if row == 2 else set())


def test_a_seed_reproduces_and_branches_differ() -> None:
    params = SamplingParams(do_sample=True, seed=42, n=2)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2))

    def text(branch: int) -> list[int]:
        one = sampler()
        one.enter(0, SamplingRow(params, [], []), branch)
        return [one.sample(logits.clone(), [0], [position])[0].item() for position in range(30)]

    assert text(0) == text(0)
    assert text(0) != text(1)


@pytest.mark.parametrize(
    "changes",
    [
        {"exponential_decay_length_penalty": (0, 1000.0)},
        {"exponential_decay_length_penalty": (0, 1000.0), "temperature": 1e-5, "do_sample": True},
        {"repetition_penalty": 1e300},
        {"presence_penalty": 1e300, "frequency_penalty": 1e300, "temperature": 1e-5, "do_sample": True},
        {"temperature": 1e300, "do_sample": True},
        {"logit_bias": {7: 1e300, 9: -1e300}, "temperature": 1e-5, "do_sample": True},
        {"logit_bias": {2: 1e300}, "exponential_decay_length_penalty": (0, 1000.0), "repetition_penalty": 0.01},
        {"logit_bias": dict.fromkeys(range(VOCAB), -1e300), "presence_penalty": 2.0},
    ],
    ids=str,
)
def test_no_setting_that_validation_lets_pass_makes_a_probability_no_number(changes: dict[str, Any]) -> None:
    s = sampler()
    s.enter(0, SamplingRow(SamplingParams(max_new_tokens=4000, seed=1, **changes), [], [7] * 50), 0)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    tokens, logprobs, *_ = s.sample(logits, [0], [3999])
    assert 0 <= int(tokens[0]) < VOCAB
    assert math.isfinite(float(logprobs[0]))
