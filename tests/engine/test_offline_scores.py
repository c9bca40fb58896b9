"""`LLM.score`: the vectors of transformers, in the callers' order, and an engine that stays usable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightllmd import LLM
from lightllmd.engine.runners.fake_model import fake_score
from lightllmd.errors import ConfigInvalid, EngineError, InvalidRequest
from model_folders import TOKENIZER
from scored_models import HEADS, Truth, write_scored
from tiny_models import write_model

QUIET = {"device": "cpu", "threads": 1, "data_type": "float32", "progress": False}
TINY = {"max_req_input_len": 100, "max_req_total_len": 200, "max_total_token_num": 1000, "running_max_req_size": 8}


def with_tokenizer(folder: Path) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder


def test_vectors_are_those_of_transformers(tmp_path: Path) -> None:
    folder = with_tokenizer(write_scored(tmp_path, HEADS["llama, three labels"]))
    prompts = [[5, 77, 3] * (1 + number % 7) for number in range(30)]
    with LLM(folder, use_reward_model=True, use_dynamic_prompt_cache=True, **TINY, **QUIET) as llm:
        outputs = llm.score(prompt_token_ids=prompts, progress=False)
        again = llm.score(prompt_token_ids=[prompts[6]], progress=False)
        assert llm.plan.scoring.labels == ["bad", "fair", "good"]
        with pytest.raises(InvalidRequest, match="use_reward_model"):
            llm.generate(prompt_token_ids=prompts)
    truth = Truth(folder)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_token_ids == prompt
        assert output.values[0] == pytest.approx(truth.vectors(prompt)[0], abs=1e-4)
        assert output.score == output.values[0][0]
    assert again[0].cached == len(prompts[6]) - 1


def test_it_is_refused_where_the_model_generates_and_the_other_way_round(tmp_path: Path) -> None:
    generates = with_tokenizer(write_model(tmp_path / "generates"))
    with LLM(generates, **TINY, **QUIET) as llm, pytest.raises(InvalidRequest, match="use_reward_model"):
        llm.score(prompt_token_ids=[[1]])
    with pytest.raises(ConfigInvalid, match="LlamaForCausalLM"):
        LLM(generates, use_reward_model=True, **TINY, **QUIET)
    scores = with_tokenizer(write_scored(tmp_path / "scores", HEADS["llama, one label"]))
    with pytest.raises(ConfigInvalid, match="use_reward_model = true"):
        LLM(scores, **TINY, **QUIET)


@pytest.mark.parametrize("overlap", [False, True])
def test_texts_and_ids_of_the_fake_engine(overlap: bool) -> None:
    with LLM(engine={"backend": "fake", "fake": {"overlap": overlap}}, use_reward_model=True) as llm:
        texts = [f"text {number}" for number in range(300)]
        outputs = llm.score(texts, progress=False, max_running=7)
        assert [output.score for output in outputs] == [fake_score(list(text.encode())) for text in texts]
        assert llm.score("one")[0].score == fake_score(list(b"one"))
        for wrong in ({}, {"prompts": ["a"], "prompt_token_ids": [[1]]}, {"prompts": [3]}, {"prompts": [""]}):
            with pytest.raises(InvalidRequest, match="prompts"):
                llm.score(**wrong)
        llm._scheduler.check()
        assert llm._scheduler.keys.used == 0


def test_scores_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    """What one token is embedded as is none; the other prompt of that call has to be asked again."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = with_tokenizer(write_scored(tmp_path, HEADS["llama, one label"]))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][9] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with LLM(folder, use_reward_model=True, **TINY, **QUIET) as llm:
        with pytest.raises(EngineError, match="NaN"):
            llm.score(prompt_token_ids=[[1, 2], [9]], progress=False)
        assert len(llm.score(prompt_token_ids=[[1, 2]], progress=False)) == 1
