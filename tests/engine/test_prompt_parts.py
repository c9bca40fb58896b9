"""Prompts that come in parts, behind cached prefixes and beside other rows; rows that draw from another's logits."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from lightllmd.config import bounds
from lightllmd.config.bounds import LOGIT_ROWS
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.step import DecodeRows, Row, SamplingRow, Step, StepResult, no_decode
from lightllmd.ipc.messages import SamplingParams
from lightllmd.kernels import eager_attention
from tiny_models import VARIANTS, Driver, load, write_model

TOLERANCE = 1e-4
ALL = SamplingParams(top_logprobs=64)  # half of the vocabulary: as good as the logits


class Feeder:
    """Hands out slots and runs steps; a table row's slots are `held`, whoever computed them."""

    def __init__(self, runner: CpuRunner, seed: int) -> None:
        self.runner, self.draw = runner, random.Random(seed)
        self.free = list(range(runner.slots))
        if seed % 2:
            self.draw.shuffle(self.free)
        self.held: dict[int, list[int]] = {}
        self.steps = 0
        with torch.inference_mode():
            for cache in runner.caches:
                cache.entries.fill_(float("nan"))

    def part(
        self,
        table_row: int,
        tokens: list[int],
        *,
        past: list[int] | None = None,
        sample: bool = True,
        prompt: int = 0,
        position: int = 0,
        params: SamplingParams | None = None,
        branch: int = 0,
        sibling_of: int | None = None,
        targets: list[int] | None = None,
        top_targets: int = 0,
    ) -> Row:
        """The next tokens of a row, which enters if there are `params`; `past`: slots of those before."""
        if params is not None:
            self.held[table_row] = list(past or [])
        start = len(self.held[table_row])
        taken = [self.free.pop(0) for _ in tokens]
        self.held[table_row] += taken
        sampling = None if params is None else SamplingRow(params, [], [])
        entry = (table_row, 1, branch, start, list(tokens), taken, sample, position, sampling, prompt, past)
        return Row(*entry, sibling_of=sibling_of, targets=targets, top_targets=top_targets)

    def going_on(self, places: dict[int, int]) -> DecodeRows:
        """`places`: table row -> position of the token to come."""
        rows = list(places)
        starts = [len(self.held[row]) for row in rows]
        slots = [self.free.pop(0) for _ in rows]
        for row, slot in zip(rows, slots, strict=True):
            self.held[row].append(slot)
        return DecodeRows(rows, starts, slots, list(places.values()))

    def run(self, *rows: Row, decode: DecodeRows | None = None, masks: dict[int, bytes] | None = None) -> StepResult:
        self.steps += 1
        step = Step(self.steps, "mixed", decode or no_decode(), list(rows), [], masks or {})
        return self.runner.run(step, lambda: None)


def truth(runner: CpuRunner, ids: list[int]) -> torch.Tensor:
    """Log-probabilities behind each token, of one forward over all. Overwrites slots, so it comes before a Feeder."""
    driver = Driver(runner)
    return driver.logits(driver.row(0, ids))[0].log_softmax(-1)


def same(result: StepResult, at: int, expected: torch.Tensor) -> None:
    """Entry `at` is the greedy token of log-probabilities ``expected [V]``, and its alternatives their best."""
    assert result.tokens[at] == expected.argmax().item()
    assert result.logprobs[at] == pytest.approx(expected.max().item(), abs=TOLERANCE)
    alternatives = result.alternatives[at]
    assert alternatives is not None
    ids, values = zip(*alternatives, strict=True)
    torch.testing.assert_close(torch.tensor(values), expected[list(ids)], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(torch.tensor(values), expected.topk(len(ids)).values, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module", params=["plain", "rope dynamic", "qwen3", "odd vocabulary"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CpuRunner:
    return load(write_model(tmp_path_factory.mktemp("tiny"), VARIANTS[request.param]), running_max_req_size=80)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> CpuRunner:
    return load(write_model(tmp_path_factory.mktemp("tiny")), running_max_req_size=80, slots=2048)


def parts(draw: random.Random, count: int) -> Iterator[tuple[int, int]]:
    """A random way to cut `count` tokens: (begin, end) of each part."""
    begin = 0
    while begin < count:
        end = draw.choice([begin + 1, draw.randint(begin + 1, count), count])
        yield begin, end
        begin = end


@pytest.mark.parametrize("seed", range(6))
def test_any_cut_of_a_prompt_behind_any_cached_prefix_equals_one_forward(runner: CpuRunner, seed: int) -> None:
    """The cached one has the same length: where angles depend on lengths, another has other keys."""
    draw, vocab, length = random.Random(seed), runner.decoder.spec.vocab, 38
    ids = draw.choices(range(vocab), k=length)
    expected = truth(runner, ids)[-1]
    feeder = Feeder(runner, seed)
    cached = draw.choice([0, 1, 13, 37])
    beside = draw.choices(range(vocab), k=5)
    streams = [feeder.run(feeder.part(7, beside, params=ALL)).tokens[0]]
    feeder.run(feeder.part(3, ids, params=SamplingParams()))
    past: list[int] | None = feeder.held[3][:cached]
    for begin, end in parts(draw, length - cached):
        last = cached + end == length
        part = feeder.part(
            *(5, ids[cached + begin : cached + end]),
            past=past,
            params=None if past is None else ALL,
            sample=last,
            prompt=length,
        )
        past = None
        result = feeder.run(part, decode=feeder.going_on({7: len(streams)}))
        assert len(result.tokens) == 1 + last
        streams.append(result.tokens[0])
    same(result, 1, expected)
    whole = feeder.run(feeder.part(3, [77], position=1), feeder.part(5, [77], position=1))
    assert whole.tokens[0] == whole.tokens[1]
    assert whole.logprobs == pytest.approx([whole.logprobs[0]] * 2, abs=TOLERANCE)
    again = Feeder(runner, 0)
    alone = [again.run(again.part(0, beside, params=ALL)).tokens[0]]
    while len(alone) < len(streams):
        alone += again.run(decode=again.going_on({0: len(alone)})).tokens
    assert streams == alone


def test_twins_have_the_logits_of_their_row_to_the_last_bit(plain: CpuRunner) -> None:
    """More rows than have logits at a time, and each of them may have twins in another part."""
    feeder, draw = Feeder(plain, 0), random.Random(2)
    greedy, drawn = SamplingParams(top_logprobs=5), SamplingParams(do_sample=True, temperature=1.3, seed=9)
    prompts = [draw.choices(range(128), k=draw.randint(1, 9)) for _ in range(LOGIT_ROWS + 2)]
    rows = [feeder.part(row, prompt, params=greedy) for row, prompt in enumerate(prompts)]
    owners = [0, 1, 1, 40, LOGIT_ROWS - 1, LOGIT_ROWS, LOGIT_ROWS + 1, 1]
    for number, owner in enumerate(owners):
        params = greedy if number % 2 else drawn
        past = feeder.held[owner]
        rows.append(feeder.part(len(rows), [], past=past, params=params, branch=number, sibling_of=owner))
    result = feeder.run(*rows)
    assert len(result.tokens) == len(rows)
    for number, owner in enumerate(owners):
        at = len(prompts) + number
        if number % 2:
            assert (result.tokens[at], result.logprobs[at]) == (result.tokens[owner], result.logprobs[owner])
            assert result.alternatives[at] == result.alternatives[owner]
        else:
            alone = Feeder(plain, 0)
            other = alone.run(alone.part(0, prompts[owner], params=drawn, branch=number))
            assert other.tokens == [result.tokens[at]]
            assert other.logprobs == pytest.approx([result.logprobs[at]], abs=TOLERANCE)


def test_twins_go_on_as_if_each_had_been_fed_the_prompt(runner: CpuRunner) -> None:
    feeder, draw = Feeder(runner, 1), random.Random(3)
    prompt = draw.choices(range(100), k=23)
    params = [SamplingParams(do_sample=True, temperature=1.5, seed=seed, top_logprobs=64) for seed in (1, 2, 2)]
    feeder.run(feeder.part(0, prompt[:9], params=params[0], sample=False, prompt=23))
    rows = [feeder.part(0, prompt[9:])]
    rows += [
        feeder.part(row, [], past=feeder.held[0][:23], params=params[row], branch=row, sibling_of=0) for row in (1, 2)
    ]
    results = [feeder.run(*rows)]
    for position in range(1, 6):
        results.append(feeder.run(decode=feeder.going_on(dict.fromkeys(range(3), position))))
    branches = list(zip(*(result.tokens for result in results), strict=True))
    assert len(set(branches)) == 3
    for row, tokens in enumerate(branches):
        alone = Feeder(runner, 0)
        other = [alone.run(alone.part(4, prompt, params=params[row], branch=row))]
        other += [alone.run(decode=alone.going_on({4: position})) for position in range(1, 6)]
        assert list(tokens) == [result.tokens[0] for result in other]
        for ours, theirs in zip(results, other, strict=True):
            assert ours.logprobs[row] == pytest.approx(theirs.logprobs[0], abs=TOLERANCE)


def test_a_row_whose_parent_changes_has_the_logits_of_its_new_history(plain: CpuRunner) -> None:
    """As beams do: a shared past, parted later; each step names the tokens, and enters rows again."""
    feeder, draw = Feeder(plain, 1), random.Random(4)
    prompt = draw.choices(range(128), k=17)
    feeder.run(
        feeder.part(0, prompt, params=ALL), feeder.part(1, [], past=list(feeder.held[0]), params=ALL, sibling_of=0)
    )
    histories = [list(prompt), list(prompt)]
    for position in range(1, 8):
        parents = [draw.randrange(2), draw.randrange(2)]
        tokens = [draw.randrange(128), draw.randrange(128)]
        histories = [[*histories[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        pasts = [list(feeder.held[parent]) for parent in parents]
        rows = []
        for row in range(2):
            moved = parents[row] != row or row == 0  # row 0 enters again though it stays
            params = ALL if moved else None
            past = pasts[row] if moved else None
            rows.append(feeder.part(row, [tokens[row]], past=past, params=params, position=position))
        result = feeder.run(*rows)
        for row in range(2):
            same(result, row, truth_beside(plain, histories[row]))


def truth_beside(runner: CpuRunner, ids: list[int]) -> torch.Tensor:
    """`truth` of the last token, by slots that no test takes: the highest ones."""
    slots = list(range(runner.slots - len(ids), runner.slots))
    step = Step(1, "prefill", no_decode(), [Row(79, 0, 0, 0, ids, slots, True, 0, None)], [])
    return runner.every_logits(step)[-1].log_softmax(-1)


def test_results_come_in_the_order_of_decode_rows_then_rows_that_sample(plain: CpuRunner) -> None:
    feeder = Feeder(plain, 1)
    a, b, c, d = [3, 14, 15], [92, 65], [35, 89, 79, 32], [38, 46, 26]
    first = feeder.run(feeder.part(0, a, params=ALL), feeder.part(1, b, params=ALL))
    rows = [
        feeder.part(2, c[:2], params=ALL, sample=False, prompt=4),
        feeder.part(3, d, params=ALL),
        feeder.part(4, [5, 6, 7], params=ALL, sample=False, prompt=9, targets=[6, 7, 8]),
        feeder.part(5, [], past=list(feeder.held[3]), params=ALL, sibling_of=1),
        feeder.part(1, [77], position=1),
    ]
    result = feeder.run(*rows, decode=feeder.going_on({0: 1}))
    assert len(result.tokens) == 4
    for at, ids in enumerate([[*a, first.tokens[0]], d, d, [*b, 77]]):
        same(result, at, truth_beside(plain, ids))
    assert len(result.targets) == 1
    nothing = feeder.run(feeder.part(2, [c[2]], sample=False, prompt=4))
    assert nothing == StepResult([], [], [], [])
    same(feeder.run(feeder.part(2, [c[3]])), 0, truth_beside(plain, c))


# --- masks ------------------------------------------------------------------------------------------------------------


def mask_of(allowed: set[int], vocab: int) -> bytes:
    words = [0] * -(-vocab // 32)
    for token in allowed:
        words[token // 32] |= 1 << token % 32
    return b"".join(word.to_bytes(4, "little") for word in words)


def test_a_mask_holds_until_it_changes_or_the_row_enters_again(plain: CpuRunner) -> None:
    feeder, ids = Feeder(plain, 0), [3, 14, 15]
    only = {31, 32, 64, 127, 0}
    masked = mask_of(only, 128)
    draws = SamplingParams(do_sample=True, temperature=2.0, seed=3, candidates=64)
    result = feeder.run(feeder.part(0, ids, params=draws), feeder.part(1, ids, params=ALL), masks={0: masked})
    expected = truth_beside(plain, ids)
    same(result, 1, expected)  # nobody else's
    inside = torch.full((128,), float("-inf"))
    inside[list(only)] = expected.exp().log()[list(only)] / 2.0
    inside = inside.log_softmax(-1)
    drawn_from = {token: value for token, value, _ in result.candidates[0] or ()}
    assert drawn_from == pytest.approx({token: inside[token].item() for token in only}, abs=TOLERANCE)
    assert result.logprobs[0] == pytest.approx(expected[result.tokens[0]].item(), abs=TOLERANCE)
    for position in range(1, 6):
        assert feeder.run(decode=feeder.going_on({0: position})).tokens[0] in only
    assert feeder.run(decode=feeder.going_on({0: 6}), masks={0: mask_of({9}, 128)}).tokens == [9]
    lifted = feeder.run(decode=feeder.going_on({0: 7}), masks={0: b""})
    assert len(lifted.candidates[0] or ()) == 64
    feeder.run(decode=feeder.going_on({0: 8}), masks={0: masked})
    again = feeder.run(feeder.part(0, ids, params=ALL))
    same(again, 0, expected)
    greedy = feeder.run(feeder.part(0, ids, params=SamplingParams()), masks={0: masked})
    assert greedy.tokens == [max(only, key=lambda token: expected[token].item())]


# --- log-probabilities of prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_targets_have_the_models_own_log_probabilities_however_the_prompt_is_cut(plain: CpuRunner, seed: int) -> None:
    draw = random.Random(seed)
    params = SamplingParams(
        do_sample=True, temperature=0.3, repetition_penalty=2.0, input_penalty=True, logit_bias={5: 9.0}, seed=1
    )
    ids = draw.choices(range(128), k=draw.choice([9, LOGIT_ROWS + 1, 2 * LOGIT_ROWS + 30]))
    top = draw.choice([0, 3, 20])
    expected = truth(plain, ids)
    feeder = Feeder(plain, seed)
    feeder.run(feeder.part(9, ids[:4], params=SamplingParams()))
    logprobs: list[float] = []
    alternatives: list[list[tuple[int, float]]] = []
    for begin, end in parts(draw, len(ids)):
        entry = params if begin == 0 else None
        of_part = feeder.part(
            *(2, ids[begin:end]),
            params=entry,
            sample=end == len(ids),
            prompt=len(ids),
            targets=ids[begin + 1 : end + 1],
            top_targets=top,
        )
        beside = feeder.part(4, ids[:7], params=SamplingParams(), targets=ids[1:7])
        result = feeder.run(of_part, beside, decode=feeder.going_on({9: 1}))
        assert len(result.targets) == 2
        assert len(result.targets[0].logprobs) == len(ids[begin + 1 : end + 1])
        logprobs += result.targets[0].logprobs
        assert (result.targets[0].alternatives is None) == (top == 0)
        alternatives += result.targets[0].alternatives or []
        other = [expected[at, ids[at + 1]].item() for at in range(6)]
        assert result.targets[1].logprobs == pytest.approx(other, abs=TOLERANCE)
        assert result.targets[1].alternatives is None
        assert result.tokens[-1] == expected[6].argmax().item()
    assert logprobs == pytest.approx([expected[at, ids[at + 1]].item() for at in range(len(ids) - 1)], abs=TOLERANCE)
    if top:
        assert len(alternatives) == len(ids) - 1
        for at, found in enumerate(alternatives):
            best = expected[at].topk(top).values.tolist()
            assert [value for _, value in found] == pytest.approx(best, abs=TOLERANCE)
            assert [value for _, value in found] == pytest.approx(
                [expected[at, token].item() for token, _ in found], abs=TOLERANCE
            )


def test_the_budget_knows_how_many_tokens_a_mask_has() -> None:
    assert eager_attention.MASK_ROWS == bounds.MASK_ROWS
