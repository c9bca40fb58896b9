"""Features of generation that go together, on a tiny model: each is in force, and greedy output is what the plain
engine's is. In the sets here each three features meet, each on or off; the long run has all sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import long_run
from covering import covering_array
from lightllmd import LLM
from lightllmd.config.features import FEATURES, pair
from lightllmd.config.plan import Plan
from lightllmd.engine.step import Step
from lightllmd.offline_jobs import Output
from tiny_models import write_model

VOCABULARY = 320
SYSTEM = "You are a careful assistant who answers every question about the weather in one short sentence. "
ENDS = [
    "Is it raining?",
    "Will the sun shi",
    "How cold is the win",
    "Snow",
    "What about tomorrow morning?",
    "Clouds ar",
]
LONG = "The weather was fine for days and days and days and days. " * 3 + SYSTEM + ENDS[0]
INPUT = 72  # tokens: max_req_input_len where it is to be exceeded
# So few slots that six prompts can't run together whole; optimistic admission tries it.
LIMITS = {
    "max_req_input_len": 100,
    "max_req_total_len": 120,
    "max_total_token_num": 210,
    "batch_max_tokens": 210,
    "running_max_req_size": 8,
    "router_max_new_token_len": 1,
    "router_max_wait_tokens": 1,
    "splitfuse_block_size": 16,
    "eos_id": [VOCABULARY - 1],
}
QUIET = {"device": "cpu", "threads": 1, "data_type": "float32"}
SEVERAL = {"max_new_tokens": 14, "n": 3}
EACH = [{"max_new_tokens": 14 + 3 * number} for number in range(1 + len(ENDS))]  # so that they end at different times


def named(switches: tuple[bool, ...]) -> set[str]:
    return {feature.key for feature, on in zip(FEATURES, switches, strict=True) if on}


def go_together(switches: tuple[bool, ...]) -> bool:
    return not any(pair(first, second).reason for first, second in combinations(sorted(named(switches)), 2))


SWITCHES = covering_array([[False, True]] * len(FEATURES), 3, go_together, whole=long_run.LONG)
MODE = {feature.key: feature.on for feature in FEATURES if feature.key == "mode"}
SETS = [named(switches) for switches in SWITCHES]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(
        tmp_path_factory.mktemp("pairs") / "tiny", {"vocab_size": VOCABULARY, "num_hidden_layers": 2}, seed=5
    )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([LONG, *ENDS, "shining shine wind winter are around"], trainer)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@dataclass
class Run:
    """What an engine made of the prompts, asked twice, and how."""

    first: list[Output]
    again: list[Output]
    several: Output  # the first prompt with n = 3
    steps: list[Step]
    paused: list[int]  # sequences, at each step
    plan: Plan


def run(model: Path, prompts: list[str], **parameters: Any) -> Run:
    steps: list[Step] = []
    paused: list[int] = []
    with LLM(model, progress=False, **QUIET, **{**LIMITS, **parameters}) as llm:

        def before(step: Step) -> None:
            steps.append(step)
            paused.append(len(llm._scheduler.queues.paused))

        llm._loop._before = before
        first, again = (llm.generate(prompts, parameters=EACH, progress=False) for _ in range(2))
        several = one(llm, prompts[0], SEVERAL)
        llm._scheduler.check()
        assert llm._scheduler.keys.used == 0
        assert not llm._loop.busy
    return Run(first, again, several, steps, paused, llm.plan)


@dataclass
class Truth:
    """What the plain engine and the one that only heals say to the same prompts, and the one that only searches with
    beams to the first one, with or without `mode`. `cut`: the end of LONG that fits. `near`: what
    log-probabilities are held to; where keys and values are quantised, sums in another order round one to its neighbour
    now and then."""

    plain: list[Output]
    healed: list[Output]
    beams: Output
    cut: str
    near: float


def one(llm: LLM, prompt: str, parameters: dict[str, Any]) -> Output:
    """By itself."""
    [output] = llm.generate(prompt, progress=False, **parameters)
    return output


@pytest.fixture(scope="module")
def truths(model: Path) -> Callable[[set[str]], Truth]:
    """The one that a set of features is held to."""
    made = cache(lambda on: true_of(model, MODE if on else {}, 2e-2 if on else 1e-4))
    return lambda features: made("mode" in features)


def true_of(model: Path, mode: dict[str, Any], near: float) -> Truth:
    with LLM(model, progress=False, **QUIET, **LIMITS, **mode) as llm:
        [ids] = llm.tokenizer.encode_batch([LONG])
        cut = llm.tokenizer.decode(ids[-INPUT:])
        assert len(ids) > INPUT
        assert llm.tokenizer.encode_batch([cut]) == [ids[-INPUT:]], "the cut text has the cut tokens"
        prompts = [cut, *(SYSTEM + end for end in ENDS)]
        assert max(map(len, llm.tokenizer.encode_batch(prompts))) == INPUT
        plain = [one(llm, prompt, {**own, "prompt_logprobs": 0}) for prompt, own in zip(prompts, EACH, strict=True)]
    with LLM(model, progress=False, token_healing_mode=True, **QUIET, **LIMITS, **mode) as llm:
        healed = [one(llm, prompt, own) for prompt, own in zip(prompts, EACH, strict=True)]
    with LLM(model, progress=False, beam_mode=True, **QUIET, **LIMITS, **mode) as llm:
        beams = one(llm, cut, SEVERAL)
    return Truth(plain, healed, beams, cut, near)


# What shows that a feature is in force in a run.


def caches(made: Run, features: set[str], truth: Truth) -> None:
    found = sum(output.cached for output in made.again)
    # Whose prompt is scored reads nothing.
    assert (found == 0) == ("return_all_prompt_logprobs" in features)


def splits(made: Run, features: set[str], truth: Truth) -> None:
    mixed = [step for step in made.steps if step.kind == "mixed"]
    assert mixed
    for step in mixed:
        assert sum(len(row.tokens) for row in step.rows if row.position == 0) <= LIMITS["splitfuse_block_size"]


def searches(made: Run, features: set[str], truth: Truth) -> None:
    found = [branch.token_ids for branch in made.several.branches]
    assert found == [branch.token_ids for branch in truth.beams.branches]
    assert len(set(map(tuple, found))) == 3


def branches_off(made: Run, features: set[str], truth: Truth) -> None:
    assert sum(row.sibling_of is not None for step in made.steps for row in step.rows) >= 2


def heals(made: Run, features: set[str], truth: Truth) -> None:
    assert all(len(output.prompt_token_ids) < output.prompt_tokens for output in made.first)


def scores(made: Run, features: set[str], truth: Truth) -> None:
    assert all(output.prompt_logprobs for output in made.first)


def cuts(made: Run, features: set[str], truth: Truth) -> None:
    assert made.first[0].prompt_tokens == INPUT


def pauses(made: Run, features: set[str], truth: Truth) -> None:
    assert any(made.paused), "nobody ever was"


def quantises(made: Run, features: set[str], truth: Truth) -> None:
    assert (made.plan.kv_scheme, made.plan.schemes.dense) == ("int8", False)


WITNESSES = {
    "use_dynamic_prompt_cache": caches,
    "splitfuse_mode": splits,
    "beam_mode": searches,
    "diverse_mode": branches_off,
    "token_healing_mode": heals,
    "return_all_prompt_logprobs": scores,
    "long_truncation_mode": cuts,
    "router_token_ratio": pauses,
    "mode": quantises,
}


def held_to(truth: Truth, made: Run, features: set[str]) -> None:
    expected = truth.healed if "token_healing_mode" in features else truth.plain
    for outputs in (made.first, made.again):
        for output, right, plain in zip(outputs, expected, truth.plain, strict=True):
            assert output.prompt_token_ids == right.prompt_token_ids
            assert output.token_ids == right.token_ids
            assert output.text == right.text
            assert output.branches[0].logprobs == pytest.approx(right.branches[0].logprobs, abs=truth.near)
            if "return_all_prompt_logprobs" in features:
                known = len(output.prompt_token_ids) - 1
                assert output.prompt_logprobs == pytest.approx(plain.prompt_logprobs[:known], abs=truth.near)
            else:
                assert output.prompt_logprobs is None
    if "beam_mode" not in features:
        assert [branch.token_ids for branch in made.several.branches] == [expected[0].token_ids] * 3
    for name in features:
        WITNESSES[name](made, features, truth)


@pytest.mark.parametrize("features", SETS, ids=lambda features: "-".join(sorted(features)))
def test_what_goes_together_generates_what_the_plain_engine_does(features: set[str], model: Path, truths: Any) -> None:
    truth = truths(features)
    parameters = {feature.key: feature.on for feature in FEATURES if feature.key in features}
    start = LONG if "long_truncation_mode" in parameters else truth.cut
    if "long_truncation_mode" in parameters:
        parameters["max_req_input_len"] = INPUT
    made = run(model, [start, *(SYSTEM + end for end in ENDS)], **parameters)
    held_to(truth, made, features)


def test_all_that_goes_together_goes_together_at_once(model: Path, truths: Any) -> None:
    parameters = {feature.key: feature.on for feature in FEATURES if feature.key != "beam_mode"}
    truth = truths(set(parameters))
    made = run(model, [LONG, *(SYSTEM + end for end in ENDS)], max_req_input_len=INPUT, **parameters)
    held_to(truth, made, set(parameters))


def test_every_feature_has_a_witness() -> None:
    assert set(WITNESSES) == {feature.key for feature in FEATURES}
