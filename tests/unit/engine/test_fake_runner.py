"""What a fake generation consists of doesn't depend on the steps that it comes by."""

from __future__ import annotations

import math
import random

import pytest

from lightllmd.config.parameters import FakeSettings
from lightllmd.engine.runners.fake import FakeRunner
from lightllmd.engine.runners.fake_model import fake_alternatives, fake_target, fake_target_alternatives, fake_token
from lightllmd.engine.step import Alternatives, DecodeRows, Row, SamplingRow, Step, StepResult, no_decode
from lightllmd.ipc.messages import SamplingParams

PROMPT = [72, 101, 108, 108, 111, 300]
PARAMS = SamplingParams(do_sample=True, seed=5, top_logprobs=8, candidates=8)


def row(
    tokens: list[int],
    start: int,
    *,
    table_row: int = 0,
    branch: int = 0,
    position: int = 0,
    sample: bool = True,
    params: SamplingParams | None = None,
    emitted: list[int] | None = None,
    **fields: object,
) -> Row:
    """A row of PROMPT's; it enters if there are `params`."""
    sampling = None if params is None else SamplingRow(params, PROMPT, emitted or [])
    return Row(table_row, 1, branch, start, tokens, list(tokens), sample, position, sampling, **fields)


def run(
    runner: FakeRunner, *rows: Row, decode: DecodeRows | None = None, masks: dict[int, bytes] | None = None
) -> StepResult:
    runner.launch(Step(1, "mixed", decode or no_decode(), list(rows), [], masks or {}), lambda: None)
    return runner.collect(lambda: None)


def going_on(table_row: int, position: int) -> DecodeRows:
    """The row feeds its newest token."""
    return DecodeRows([table_row], [len(PROMPT) + position - 1], [0], [position])


def mask_of(*allowed: int, words: int = 9) -> bytes:
    return sum(1 << token for token in allowed).to_bytes(4 * words, "little")


def given(found: Alternatives | None) -> Alternatives:
    assert found is not None
    return found


def test_tokens_and_alternatives_are_the_same_by_every_way_that_a_prompt_comes() -> None:
    draw = random.Random(1)
    tokens = [fake_token(PROMPT, 5, 2, position) for position in range(6)]
    alternatives = [fake_alternatives(PROMPT + tokens[:position], 8) for position in range(6)]
    assert len({found[0] for found in alternatives}) > 1
    for _ in range(40):
        runner = FakeRunner(FakeSettings())
        cached, emitted = draw.randrange(len(PROMPT)), draw.randrange(4)
        known = PROMPT + tokens[:emitted]
        cut = draw.randint(cached, len(known) - 1)
        entry, start = PARAMS, cached
        if cut > cached:
            part = row(known[start:cut], start, branch=2, sample=False, params=entry, emitted=tokens[:emitted])
            assert run(runner, part) == StepResult([], [], [], [])
            entry, start = None, cut
        rest = row(known[start:], start, branch=2, position=emitted, params=entry, emitted=tokens[:emitted])
        results = [run(runner, rest)]
        for position in range(emitted + 1, 6):
            if draw.random() < 0.5:
                results.append(run(runner, decode=going_on(0, position)))
            else:  # the scheduler names the token
                fed = row(tokens[position - 1 : position], len(PROMPT) + position - 1, branch=2, position=position)
                results.append(run(runner, fed))
        assert [result.tokens for result in results] == [[token] for token in tokens[emitted:]]
        assert [result.alternatives for result in results] == [[found] for found in alternatives[emitted:]]


def test_a_row_that_enters_with_another_history_has_its_alternatives() -> None:
    """As beams do: what they are fed need not be what they sampled."""
    runner = FakeRunner(FakeSettings())
    run(runner, row(PROMPT, 0, params=PARAMS))
    for table_row, branch in ((0, 0), (3, 1)):
        entered = row([77], 7, table_row=table_row, branch=branch, position=2, params=PARAMS, emitted=[65, 77])
        assert run(runner, entered).alternatives == [fake_alternatives([*PROMPT, 65, 77], 8)]
    fed = row([90], 8, position=3)
    assert run(runner, fed).alternatives == [fake_alternatives([*PROMPT, 65, 77, 90], 8)]


def test_twins_have_tokens_of_their_own_branch_and_the_alternatives_of_the_prompt() -> None:
    rows = [row(PROMPT, 0, params=PARAMS)]
    rows += [row([], 6, table_row=n, branch=n, params=PARAMS, past=list(range(6)), sibling_of=0) for n in (1, 2)]
    result = run(FakeRunner(FakeSettings()), *rows)
    assert result.tokens == [fake_token(PROMPT, 5, branch, 0) for branch in range(3)]
    assert result.alternatives == [fake_alternatives(PROMPT, 8)] * 3


@pytest.mark.parametrize("allowed", [(200,), (3, 40, 256), tuple(range(0, 288, 7))], ids=str)
def test_a_mask_leads_to_the_next_allowed_token_until_it_is_lifted(allowed: tuple[int, ...]) -> None:
    runner, mask = FakeRunner(FakeSettings()), mask_of(*allowed)
    free = [fake_token(PROMPT, 5, 0, position) for position in range(4)]
    expected = [min((token for token in allowed if token >= want), default=min(allowed)) for want in free]
    first = run(runner, row(PROMPT, 0, params=PARAMS), masks={0: mask})
    results = [first, *(run(runner, decode=going_on(0, position)) for position in range(1, 4))]
    assert [result.tokens for result in results] == [[token] for token in expected]
    assert [fake_token(PROMPT, 5, 0, position, mask=mask) for position in range(4)] == expected
    assert first.alternatives == [fake_alternatives(PROMPT, 8)], "the model's, whatever is masked"
    found = [(token, value) for token, value, _ in given(first.candidates[0])]
    assert found == fake_alternatives(PROMPT, 8, mask)
    assert len({token for token, _ in found}) == len(found) == min(8, len(allowed))
    assert {token for token, _ in found} <= set(allowed)
    assert run(runner, decode=going_on(0, 2), masks={0: b""}).tokens == [free[2]]
    run(runner, decode=going_on(0, 3), masks={0: mask})
    assert run(runner, row(PROMPT, 0, params=PARAMS)).tokens == [free[0]]


def test_probabilities_of_alternatives_fall_and_make_no_more_than_one() -> None:
    for seed in range(200):
        values = [value for _, value in fake_alternatives([seed, 1], 64)]
        assert len(values) == 64
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1


def test_log_probabilities_of_a_prompt_do_not_depend_on_its_parts() -> None:
    runner = FakeRunner(FakeSettings())
    targets = PROMPT[1:]
    whole = run(runner, row(PROMPT, 0, params=PARAMS, targets=targets, top_targets=3))
    (scores,) = whole.targets
    assert scores.logprobs == [fake_target(at, PROMPT[at], target) for at, target in enumerate(targets)]
    assert scores.alternatives == [fake_target_alternatives(at, PROMPT[at], 3) for at in range(5)]
    assert all(value <= 0 for value in scores.logprobs)
    first = run(runner, row(PROMPT[:2], 0, params=PARAMS, sample=False, targets=targets[:2]))
    second = run(runner, row(PROMPT[2:], 2, targets=targets[2:]))
    assert first.tokens == []
    assert second.tokens == whole.tokens
    assert first.targets[0].logprobs + second.targets[0].logprobs == scores.logprobs
    assert first.targets[0].alternatives is None


def test_poison_is_found_in_a_prompt_whose_part_with_it_is_cached() -> None:
    runner = FakeRunner(FakeSettings(poison="Hell", poison_way="exception"))
    with pytest.raises(RuntimeError, match="poisoned"):
        run(runner, row(PROMPT[5:], 5, params=PARAMS, past=list(range(5))))
