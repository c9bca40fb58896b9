"""The device's sampler: what it keeps of a row between steps, and that it agrees with the sampler of a CPU."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lightllmd.engine.sampling import gpu_sampler as device_sampler
from lightllmd.engine.sampling.cpu_sampler import Sampler
from lightllmd.engine.sampling.gpu_sampler import DeviceSampler
from lightllmd.engine.step import SamplingRow
from lightllmd.ipc.messages import SamplingParams

# numpy, which interprets, tells of each infinity that is dealt with later.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB, EOS, ROWS = 97, [2, 5], 8  # row ROWS is padding's
PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.7, "repetition_penalty": 1.3}
Result = tuple[list[int], list[float], list[list[tuple[int, float]] | None]]
Candidates = list[list[tuple[int, float, float]] | None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Device:
    """A `DeviceSampler` as a runner drives it."""

    candidates: Candidates  # of the newest step

    def __init__(self, vocab: int = VOCAB, *, processed: bool = False) -> None:
        self.sampler = DeviceSampler(ROWS + 1, vocab, [*EOS, EOS[0], vocab + 3], DEVICE, processed=processed)
        self.last = torch.full((ROWS + 1,), -1, dtype=torch.int32, device=DEVICE)

    def enter(
        self, row: int, params: SamplingParams, prompt: list[int] | None = None, emitted: list[int] | None = None
    ) -> None:
        self.sampler.enter(row, SamplingRow(params, prompt or [], emitted or []), 0)

    def sample(self, logits: Tensor, rows: list[int], positions: list[int]) -> Result:
        """`logits` may have more rows: the rest is padding."""
        pad = len(logits) - len(rows)
        self.sampler.flush()
        there = logits.to(DEVICE, copy=True)
        tokens, logprobs, *rest = self.sampler.sample(
            there,
            rows,
            torch.tensor(rows + [ROWS] * pad, dtype=torch.int32, device=DEVICE),
            torch.tensor(positions + [0] * pad, dtype=torch.int32, device=DEVICE),
            self.last,
        )
        torch.testing.assert_close(there, logits.to(DEVICE), rtol=0, atol=0, equal_nan=True)  # they are only read
        tokens, logprobs, *rest = (tensor[: len(rows)].tolist() for tensor in (tokens, logprobs, *rest))
        alternatives, self.candidates = self.sampler.reports(rows, *rest)
        return tokens, logprobs, alternatives


@pytest.mark.parametrize("processed", [False, True])
def test_greedy_rows_agree_with_the_sampler_of_a_cpu_step_by_step(processed: bool) -> None:
    """Penalties, eos decay and eos mask over many steps, with rows leaving and entering."""
    draw = random.Random(0)
    device = Device(processed=processed)
    cpu = Sampler(ROWS, 64, VOCAB, EOS, torch.device("cpu"), processed=processed)
    positions: dict[int, int] = {}
    for step in range(8):
        for row in range(ROWS):
            if row not in positions or draw.random() < 0.1:
                params = SamplingParams(
                    presence_penalty=draw.choice([0.0, 1.5]),
                    frequency_penalty=draw.choice([0.0, 0.4]),
                    repetition_penalty=draw.choice([1.0, 1.7]),
                    exponential_decay_length_penalty=draw.choice([(1, 1.0), (3, 1.3)]),
                    input_penalty=draw.random() < 0.5,
                    min_new_tokens=draw.choice([1, 6]),
                )
                prompt = draw.choices(range(VOCAB), k=5) if params.input_penalty else []
                emitted = draw.choices(range(12), k=draw.randrange(6))
                device.enter(row, params, prompt, emitted)
                cpu.enter(row, SamplingRow(params, prompt, emitted), 0)
                positions[row] = len(emitted)
        rows = draw.sample(range(ROWS), k=6)
        generated = [positions[row] for row in rows]
        logits = normal(7, VOCAB, seed=step) * 3
        tokens, logprobs, _ = device.sample(logits, rows, generated)
        expected, expected_logprobs, *_ = cpu.sample(logits[:6].clone(), rows, generated)
        assert tokens == expected.tolist(), step
        assert logprobs == pytest.approx(expected_logprobs.tolist(), rel=1e-4, abs=1e-4)
        assert device.last[rows].tolist() == tokens
        cpu.record(rows, tokens)
        for row in rows:
            positions[row] += 1


@pytest.mark.parametrize("processed", [False, True])
def test_typical_rows_beside_others_agree_with_the_sampler_of_a_cpu_step_by_step(processed: bool) -> None:
    """Also where they leave and another takes their place, with penalties that count what they drew."""
    draw = random.Random(2)
    device = Device(processed=processed)
    cpu = Sampler(ROWS, 64, VOCAB, EOS, torch.device("cpu"), processed=processed)
    changed = 0
    for step in range(10):
        for row in range(ROWS):
            if step == 0 or draw.random() < 0.2:
                params = SamplingParams(
                    do_sample=draw.random() < 0.9,
                    temperature=draw.choice([1.0, 0.6, 2.0]),
                    typical_p=draw.choice([1.0, 0.1, 0.4, 0.8]),
                    top_p=draw.choice([1.0, 0.8]),
                    top_k=draw.choice([-1, 30]),
                    presence_penalty=draw.choice([0.0, 1.5]),
                    logit_bias=draw.choice([{}, {}, {9: 3.0}]),
                    top_logprobs=draw.choice([0, 3]),
                    seed=draw.getrandbits(63),
                )
                device.enter(row, params)
                cpu.enter(row, SamplingRow(params, [], []), 0)
        rows = draw.sample(range(ROWS), k=6)
        logits = normal(7, VOCAB, seed=step) * 3
        tokens, logprobs, alternatives = device.sample(logits, rows, [step] * 6)
        truth = cpu.sample(logits[:6].clone(), rows, [step] * 6)
        assert tokens == truth.tokens.tolist(), step
        assert logprobs == pytest.approx(truth.logprobs.tolist(), rel=1e-4, abs=1e-4)
        assert [None if one is None else [token for token, _ in one] for one in alternatives] == [
            None if one is None else [token for token, _ in one] for one in truth.alternatives
        ]
        assert device.last[rows].tolist() == tokens
        cpu.record(rows, tokens)
        changed += tokens != logits[:6].argmax(-1).tolist()
    assert changed


LIMITS = [{"top_p": 0.95}, {"min_p": 0.3}, {"top_p": 0.95, "min_p": 0.1}, {"typical_p": 0.6}]


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_a_row_that_enters_again_with_what_it_emitted_goes_on_as_if_it_had_stayed(limit: dict[str, float]) -> None:
    params = SamplingParams(do_sample=True, seed=9, input_penalty=True, **limit, **PENALTIES)
    stayed, prompt, emitted = Device(), [9, 9, 12], []
    stayed.enter(0, params, prompt)
    logits = normal(1, VOCAB, seed=4) * 0.5
    for position in range(10):
        emitted += stayed.sample(logits, [0], [position])[0]
    again = Device()
    again.enter(3, params, prompt, emitted[:6])
    results = [again.sample(logits, [3], [position])[0][0] for position in range(6, 10)]
    assert results == emitted[6:]


def test_histories_longer_than_an_upload_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_sampler, "FLUSH_IDS", 7)
    params = SamplingParams(presence_penalty=1.0, frequency_penalty=0.01)
    device, cpu = Device(), Sampler(ROWS, 400, VOCAB, EOS, torch.device("cpu"))
    for row in range(4):
        history = random.Random(row).choices(range(VOCAB), k=100 * row)
        device.enter(row, params, [], history)
        cpu.enter(row, SamplingRow(params, [], history), 0)
    logits = normal(4, VOCAB, seed=3)
    tokens, logprobs, _ = device.sample(logits, [0, 1, 2, 3], [0] * 4)
    expected, expected_logprobs, *_ = cpu.sample(logits.clone(), [0, 1, 2, 3], [0] * 4)
    assert tokens == expected.tolist()
    assert logprobs == pytest.approx(expected_logprobs.tolist(), rel=1e-5)


def test_a_reused_row_remembers_nothing_of_its_former_owner() -> None:
    reused, fresh = Device(), Device()
    reused.enter(0, SamplingParams(presence_penalty=50.0), [], [1, 2, 3])
    reused.sample(normal(1, VOCAB), [0], [3])
    reused.enter(0, SamplingParams(presence_penalty=70.0), [], [8])  # gone before the next step
    for one in (reused, fresh):
        one.enter(0, SamplingParams(presence_penalty=0.1))
    logits = normal(1, VOCAB, seed=1)
    assert reused.sample(logits, [0], [0]) == fresh.sample(logits, [0], [0])


def test_padding_changes_nothing() -> None:
    device = Device()
    for row in range(3):
        device.enter(row, SamplingParams(do_sample=True, seed=row, top_k=5 * row, **PENALTIES))
    logits = normal(8, VOCAB)
    logits[3:] = float("nan")
    alone = Device()
    for row in range(3):
        alone.enter(row, SamplingParams(do_sample=True, seed=row, top_k=5 * row, **PENALTIES))
    for position in range(3):
        padded = device.sample(logits, [0, 1, 2], [position] * 3)
        assert padded == alone.sample(logits[:3], [0, 1, 2], [position] * 3)


def test_eos_may_be_the_token_at_min_new_tokens_and_not_before() -> None:
    device = Device()
    device.enter(0, SamplingParams(min_new_tokens=3, max_new_tokens=9))
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS[1]], logits[0, 50] = 10.0, 5.0
    chosen = [device.sample(logits, [0], [position])[0][0] for position in range(4)]
    assert chosen == [50, 50, EOS[1], EOS[1]]


KINDS = [  # alone, and together, which changes what is launched
    SamplingParams(),
    SamplingParams(do_sample=True, temperature=0.5, top_k=1, top_logprobs=4),
    SamplingParams(do_sample=True, temperature=1.5, top_p=0.7, seed=3),
    SamplingParams(do_sample=True, top_p=0.6, seed=1, top_logprobs=3, presence_penalty=2.0),
    SamplingParams(top_logprobs=20, logit_bias={9: 4.0, 40: -3.0}),
    SamplingParams(do_sample=True, seed=5, min_new_tokens=8, logit_bias={2: 9.0}, temperature=0.8),
    SamplingParams(candidates=64, top_logprobs=2, repetition_penalty=1.4),
    SamplingParams(candidates=64, logit_bias={11: 3.0}),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("processed", [False, True])
def test_log_probabilities_alternatives_and_candidates_are_those_of_a_cpus_sampler(
    processed: bool, masked: bool
) -> None:
    """Which is tested against what they should be."""
    device = Device(processed=processed)
    cpu = Sampler(ROWS, 64, VOCAB, EOS, torch.device("cpu"), processed=processed)
    rows = list(range(len(KINDS)))
    for row, params in enumerate(KINDS):
        device.enter(row, params, [], [11])
        cpu.enter(row, SamplingRow(params, [], [11]), 0)
        if masked:
            device.sampler.restrict(row, mask_of([*EOS, *range(row, VOCAB, 3)]))
            cpu.restrict({row: mask_of([*EOS, *range(row, VOCAB, 3)])})
    logits = normal(ROWS, VOCAB, seed=8) * 2
    for some in ([row] for row in rows) if not masked else ():
        agree(device, cpu, logits[some], some)
    agree(device, cpu, logits, rows)


def agree(device: Device, cpu: Sampler, logits: Tensor, rows: list[int]) -> None:
    tokens, logprobs, alternatives = device.sample(logits, rows, [1] * len(rows))
    truth = cpu.sample(logits.clone(), rows, [1] * len(rows))
    assert tokens == truth.tokens.tolist()
    cpu.record(rows, tokens)  # the device has counted them
    assert logprobs == pytest.approx(truth.logprobs.tolist(), abs=1e-4)
    tables = ((alternatives, truth.alternatives), (device.candidates, truth.candidates))
    for found, expected in (pair for table in tables for pair in zip(*table, strict=True)):
        assert (found is None) == (expected is None)
        assert [one[0] for one in found or ()] == [one[0] for one in expected or ()]
        for one, other in zip(found or (), expected or (), strict=True):
            assert one[1:] == pytest.approx(other[1:], abs=1e-4)


def test_alternatives_of_a_vocabulary_of_less_than_twenty() -> None:
    device = Device(vocab=9)
    device.enter(0, SamplingParams(top_logprobs=20))
    alternatives = device.sample(normal(1, 9), [0], [0])[2][0]
    assert alternatives is not None
    assert sorted(token for token, _ in alternatives) == list(range(9))


def mask_of(allowed: list[int]) -> bytes:
    number = sum(1 << token for token in set(allowed))
    return number.to_bytes(-(-VOCAB // 32) * 4, "little")


def test_a_mask_leaves_only_what_it_allows() -> None:
    device = Device()
    device.enter(0, SamplingParams())
    device.enter(1, SamplingParams(do_sample=True, top_p=0.9, seed=4, min_new_tokens=5, top_logprobs=5))
    logits = normal(2, VOCAB)
    allowed = [33, EOS[0]]
    for row in (0, 1):
        device.sampler.restrict(row, mask_of(allowed))
    tokens, logprobs, alternatives = device.sample(logits, [0, 1], [0, 0])
    assert tokens[0] == max(allowed, key=lambda token: logits[0, token].item())
    assert logprobs[0] == pytest.approx(logits[0].log_softmax(-1)[tokens[0]].item(), abs=1e-5)
    assert tokens[1] == 33  # eos is allowed, and masked until the fifth token
    assert alternatives[1] is not None
    assert [token for token, _ in alternatives[1]] == logits[1].topk(5).indices.tolist()  # the model's


def test_a_row_keeps_its_mask_until_it_is_lifted_or_the_row_enters_again() -> None:
    device = Device()
    logits = normal(2, VOCAB)
    best = logits.argmax(-1).tolist()
    for row in (0, 1):
        device.enter(row, SamplingParams())
    assert device.sample(logits, [0, 1], [0, 0])[0] == best
    device.sampler.restrict(0, mask_of([7]))
    for _ in range(2):
        assert device.sample(logits, [0, 1], [0, 0])[0] == [7, best[1]], "the row beside it is free"
    device.sampler.restrict(0, mask_of([8]))
    assert device.sample(logits, [0, 1], [0, 0])[0] == [8, best[1]]
    device.sampler.restrict(0, b"")
    device.sampler.restrict(1, mask_of([9]))
    assert device.sample(logits, [0, 1], [0, 0])[0] == [best[0], 9]
    device.enter(1, SamplingParams())
    assert device.sample(logits, [0, 1], [0, 0])[0] == best
    device.sampler.restrict(1, mask_of([9]))
    device.enter(1, SamplingParams())
    device.sampler.restrict(1, mask_of([10]))
    assert device.sample(logits, [0, 1], [0, 0])[0] == [best[0], 10], "one that comes with the entry counts"


def test_batches_without_masks_and_biases_launch_what_they_launch_without_such_rows_beside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched: list[tuple[bool, bool]] = []
    kernels = device_sampler.sampling.sample

    def noted(*arguments: Any, plain: bool, **more: Any) -> tuple[Tensor, ...]:
        launched.append((plain, arguments[6] is not None))
        return kernels(*arguments, plain=plain, **more)

    monkeypatch.setattr(device_sampler.sampling, "sample", noted)
    device = Device()
    for row, bias in ((0, {}), (1, {}), (2, {4: 1.0})):
        device.enter(row, SamplingParams(logit_bias=bias))
    device.sampler.restrict(1, mask_of([3]))
    logits = normal(1, VOCAB)
    for row in range(3):
        device.sample(logits, [row], [0])
    device.enter(1, SamplingParams())
    device.sample(logits, [1], [0])
    assert launched == [(True, False), (False, True), (False, False), (True, False)]


@pytest.mark.parametrize("params", [{}, {"do_sample": True, "seed": 3}, {"presence_penalty": 1.0}], ids=str)
def test_biases_are_added_before_all_else_to_their_own_rows(
    params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_sampler, "FLUSH_IDS", 2)
    bias = {5: 1.5, VOCAB - 1: -100.0, 0: 0.25}
    device, plain = Device(processed=True), Device(processed=True)
    logits = normal(4, VOCAB, seed=2)
    for row in range(3):
        device.enter(row, SamplingParams(**params, logit_bias=bias if row else {}), [], [5])
        plain.enter(row, SamplingParams(**params), [], [5])
    changed = logits.clone()
    for token, added in bias.items():
        changed[[0, 2], token] += added
    order = [2, 0, 1]
    biased = [changed[0], logits[1], changed[2], logits[3]]
    assert device.sample(logits, order, [1] * 3) == plain.sample(torch.stack(biased), order, [1] * 3)
    device.enter(2, SamplingParams(**params), [], [5])
    again = device.sample(logits[:1], [2], [1])
    fresh = Device(processed=True)
    fresh.enter(2, SamplingParams(**params), [], [5])
    assert again == fresh.sample(logits[:1], [2], [1])


@pytest.mark.parametrize("processed", [False, True])
def test_a_bias_beyond_all_measure_leaves_numbers(processed: bool) -> None:
    device = Device(processed=processed)
    device.enter(0, SamplingParams(logit_bias={3: 1e300, 4: -1e300}))
    logits = normal(1, VOCAB)
    tokens, logprobs, _ = device.sample(logits, [0], [0])
    assert tokens == [3]
    assert logprobs == pytest.approx([0.0 if processed else logits.log_softmax(-1)[0, 3].item()], abs=1e-5)


def test_a_row_whose_token_was_chosen_elsewhere_enters_with_the_counts_of_its_new_past() -> None:
    """A beam: what the device sampled of it is not what it is fed next."""
    params = SamplingParams(candidates=8, **PENALTIES)
    beam, history = Device(), [4]
    beam.enter(0, params, [], history)
    for step in range(4):
        logits = normal(1, VOCAB, seed=step)
        token = beam.sample(logits, [0], [len(history)])[0][0]
        history = [*history[:-1], (token + 5) % VOCAB, 11]  # another beam's past
        beam.enter(0, params, [], history)
        fresh = Device()
        fresh.enter(3, params, [], history)
        assert beam.sample(logits, [0], [len(history)]) == fresh.sample(logits, [3], [len(history)])
        beam.enter(0, params, [], history)


def test_min_p_looks_at_the_logits_after_penalties_and_temperature() -> None:
    device = Device()
    cpu = Sampler(ROWS, 64, VOCAB, EOS, torch.device("cpu"))
    logits = torch.zeros(1, VOCAB)
    logits[0, [10, 20, 30, 50]] = torch.tensor([4.0, 2.7, 2.5, 9.0])  # 1, 0.52 and 0.47 of the highest; penalised
    rows = list(range(ROWS))
    for row in rows:
        params = SamplingParams(do_sample=True, temperature=2.0, min_p=0.5, presence_penalty=9.0, seed=row)
        device.enter(row, params, [], [50])
        cpu.enter(row, SamplingRow(params, [], [50]), 0)
    assert set(device.sample(logits.expand(ROWS, -1), rows, [1] * ROWS)[0]) == {10, 20}
    assert set(cpu.sample(logits.repeat(ROWS, 1), rows, [1] * ROWS)[0].tolist()) == {10, 20}


def test_a_row_without_entry_is_greedy() -> None:
    device = Device()
    logits = normal(2, VOCAB)
    device.enter(0, SamplingParams(do_sample=True, seed=1))
    assert device.sample(logits, [0, 4], [0, 0])[0][1] == logits[1].argmax().item()


@pytest.mark.parametrize(
    "changes",
    [
        {"exponential_decay_length_penalty": (0, 1000.0)},
        {"exponential_decay_length_penalty": (0, 1000.0), "temperature": 1.1e-5, "do_sample": True},
        {"exponential_decay_length_penalty": (2**40, 1.5), "min_new_tokens": 2**40},
        {"repetition_penalty": 1e300},
        {"repetition_penalty": 1e-300, "temperature": 1.1e-5, "do_sample": True},
        {"presence_penalty": 1e300, "frequency_penalty": -1e300, "temperature": 1.1e-5, "do_sample": True},
        {"temperature": 1e300, "do_sample": True, "top_p": 0.5},
        {"temperature": 1.1e-5, "do_sample": True, "min_p": 1e-300},
        {"temperature": 1e300, "do_sample": True, "min_p": 1.0},
        {"temperature": 1e-300, "do_sample": True, "top_k": 2**40},
    ],
    ids=str,
)
def test_no_setting_that_validation_lets_pass_makes_a_probability_no_number(changes: dict[str, Any]) -> None:
    device = Device()
    device.enter(0, SamplingParams(max_new_tokens=4000, seed=2**63 - 1, **changes), [], [7] * 50)
    logits = normal(1, VOCAB, seed=1)
    logits[0, 7] = 0.0
    tokens, logprobs, _ = device.sample(logits, [0], [3999])
    assert 0 <= tokens[0] < VOCAB
    assert math.isfinite(logprobs[0])
