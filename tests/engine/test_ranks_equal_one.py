"""What is generated with several ranks is what one generates, in every way of generating: a tiny random model in fp32,
gloo between ranks that are threads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lightllmd.offline
from lightllmd import LLM
from lightllmd.offline import Output
from long_run import LONG
from model_folders import TOKENIZER
from rank_threads import ThreadRanks
from swap_models import write_tiny_model
from tiny_models import VARIANTS, write_model

QUIET = {"device": "cpu", "threads": 1, "data_type": "float32", "progress": False}
TINY = {"max_req_input_len": 100, "max_req_total_len": 200, "max_total_token_num": 1000, "running_max_req_size": 8}
PROMPTS = [[5, 9, 17, 30, 31, 8, 77], [60, 5], [5, 9, 17, 30, 31, 8, 77, 3, 4, 90]]
TOLERANCE = 1e-4
long = pytest.mark.skipif(not LONG, reason="LIGHTLLMD_LONG_TESTS is not set")
COUNTS = [2, pytest.param(3, marks=long)]
DRAWN = {"do_sample": True, "temperature": 1.2, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, VARIANTS["qwen3"] | {"num_attention_heads": 6, "num_key_value_heads": 3})
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ThreadRanks]]:
    made: list[ThreadRanks] = []

    def start(plan: Any) -> ThreadRanks:
        made.append(ThreadRanks(plan))
        return made[-1]

    monkeypatch.setattr(lightllmd.offline, "ChildRanks", start)
    yield made
    for ranks in made:
        assert ranks.failures == []
        assert not any(thread.is_alive() for thread in ranks.threads)


def alike(outputs: list[Output], truth: list[Output]) -> None:
    for output, other in zip(outputs, truth, strict=True):
        assert [branch.token_ids for branch in output.branches] == [branch.token_ids for branch in other.branches]
        for branch, one in zip(output.branches, other.branches, strict=True):
            assert branch.logprobs == pytest.approx(one.logprobs, abs=TOLERANCE)
        assert output.cached == other.cached
        if other.prompt_logprobs is not None:
            assert output.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=TOLERANCE)


def ways(llm: LLM, **sampling: Any) -> list[Output]:
    """Greedy, drawn, several branches, told log-probabilities, restricted by grammars: in one batch, and once more."""

    def generate(parameters: list[dict[str, Any]]) -> list[Output]:
        return llm.generate(
            prompt_token_ids=PROMPTS,
            parameters=parameters,
            max_new_tokens=8,
            ignore_eos=True,
            progress=False,
            **sampling,
        )

    drawn = [DRAWN | {"seed": seed, "n": 1 + seed} for seed in range(3)]
    told = [{"prompt_logprobs": 2}, {"top_logprobs": 3}, {"allowed_token_ids": [5, 6, 7, 8]}]
    return generate([{}] * 3) + generate(drawn) + generate(told) + generate(drawn)


@pytest.mark.parametrize("tp", COUNTS)
@pytest.mark.parametrize(
    "modes",
    [
        pytest.param({}, id="plain", marks=long),
        pytest.param(
            {"use_dynamic_prompt_cache": True, "splitfuse_mode": True, "splitfuse_block_size": 4},
            id="prompt cache and splitfuse",
        ),
    ],
)
def test_every_way_of_generating(model: Path, modes: dict[str, Any], tp: int) -> None:
    with LLM(model, **QUIET, **TINY, **modes) as llm:
        truth = ways(llm)
    with LLM(model, tp=tp, **QUIET, **TINY, **modes) as llm:
        alike(ways(llm), truth)
        # Asleep, with the weights kept, and back.
        runner = llm._runner
        runner.stage()
        runner.release(lambda done, total: None)
        llm._scheduler.flush_cache()
        runner.restore(lambda done, total: None)
        runner.prepare(lambda: None)
        alike(ways(llm), truth)


@pytest.mark.parametrize("tp", COUNTS)
def test_beams(model: Path, tp: int) -> None:
    found = []
    for count in (1, tp):
        with LLM(model, tp=count, beam_mode=True, **QUIET, **TINY) as llm:
            found.append(llm.generate(prompt_token_ids=PROMPTS, best_of=3, max_new_tokens=10, progress=False))
    alike(found[1], found[0])


@pytest.mark.parametrize("tp", COUNTS)
def test_grammars(tmp_path: Path, tp: int) -> None:
    """Their masks come when the forward computes."""
    found, model = [], write_tiny_model(tmp_path)
    for count in (1, tp):
        with LLM(model, tp=count, **QUIET, **TINY) as llm:
            shaped = [{"guided_regex": "(a|b)+c"}, {"guided_choice": ["bad", "good"]}, {}]
            found.append(
                llm.generate(
                    prompt_token_ids=PROMPTS,
                    parameters=shaped,
                    max_new_tokens=12,
                    do_sample=True,
                    seed=3,
                    progress=False,
                )
            )
    alike(found[1], found[0])


@pytest.mark.parametrize("tp", COUNTS)
def test_embeddings(model: Path, tp: int) -> None:
    found = []
    for count in (1, tp):
        with LLM(model, tp=count, **QUIET, **TINY) as llm:
            found.append([one.embedding for one in llm.embed(prompt_token_ids=PROMPTS, progress=False)])
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)
