"""Each way to store weights and KV cache beside all that an engine does with them: what a mode alone gives, it gives in
blocks, from the prompt cache, paused, in branches and beams, and to a stream whose engine was killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightllmd import LLM
from lightllmd.config.modes import MODES
from lightllmd.ipc.messages import SamplingParams, Submit
from lightllmd.offline_jobs import Output
from model_folders import TOKENIZER
from tiny_models import write_model

# Each scheme of weights and of the KV cache, and rules of layers; a row of 72 inputs is no multiple of any group.
COMBINATIONS = {
    "w8a16-int8": {"mode": ["triton_w8a16", "triton_int8kv"]},
    "w4a16-int8_group8": {"mode": ["triton_w4a16", "g32", "ppl_int8kv"]},
    "w8a8-int4_group8": {"mode": ["ppl_w8a8_mixdown", "ppl_int4kv_flashdecoding"], "quantise": {"mixdown": "1"}},
    "fp8-fp8": {"mode": ["fp8", "fp8kv"]},
    "fp8_block-int4": {"mode": ["fp8_block", "int4kv"]},
    "layers": {"mode": ["triton_w4a16"], "quantise": {"rules": ["0: w8a16", "down: dense", "qkv 1: w8a8"]}},
}
ENGINE: dict[str, Any] = {
    "device": "cpu",
    "threads": 1,
    "data_type": "float32",
    "progress": False,
    "max_req_input_len": 60,
    "max_req_total_len": 80,
    "max_total_token_num": 120,
    "running_max_req_size": 6,
    "eos_id": [95],
}
# So few slots that the prompts can't run together whole; optimistic admission tries it.
FEATURES: dict[str, Any] = {
    "use_dynamic_prompt_cache": True,
    "splitfuse_mode": True,
    "splitfuse_block_size": 8,
    "diverse_mode": True,
    "return_all_prompt_logprobs": False,
    "router_token_ratio": 0.9,
    "router_max_new_token_len": 1,
    "router_max_wait_tokens": 1,
    "batch_max_tokens": 80,
}
PROMPTS = [[7, *range(3, 23)], [7, *range(3, 20), 40, 41, 42], [9, 8, 7, 6], [50 + number for number in range(30)]]
NEW = 12
NEAR = 2e-2  # of a log-probability: sums in another order round a value to its neighbour now and then


@contextmanager
def engine(model: Path, written: dict[str, Any], **features: Any) -> Iterator[LLM]:
    with LLM(model, **ENGINE, **written, **features) as llm:
        yield llm
        llm._scheduler.check()
        assert llm._scheduler.keys.used == 0


def asked(llm: LLM, prompts: list[list[int]], **sampling: Any) -> list[Output]:
    return llm.generate(prompt_token_ids=prompts, progress=False, max_new_tokens=NEW, ignore_eos=True, **sampling)


def replayed(llm: LLM, prompt: list[int], emitted: list[int]) -> list[int]:
    """The tokens of a request that an engine which died had given `emitted` of."""
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    assert llm._scheduler.submit(Submit(77, 0, 1, 77, prompt, params, branches=[0], emitted=[emitted])) is None
    told: list[int] = []
    while llm._loop.busy:
        for output in llm._loop.turn(lambda: None).values():
            told += [token for request, token in zip(output.requests, output.tokens, strict=True) if request == 77]
    return told


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"num_hidden_layers": 2, "intermediate_size": 72}
    folder = write_model(tmp_path_factory.mktemp("modes") / "tiny", shape, seed=3)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_mode_gives_beside_everything_what_it_gives_alone(name: str, model: Path) -> None:
    written = COMBINATIONS[name]
    with engine(model, written) as llm:
        assert not llm.plan.schemes.dense
        alone = [asked(llm, [prompt], prompt_logprobs=0)[0] for prompt in PROMPTS]
        vectors = llm.embed(prompt_token_ids=PROMPTS[:2])
        tokens = [output.token_ids for output in alone]
        # A stream whose engine was killed goes on in this one, whatever it had.
        for emitted in (1, 7):
            assert replayed(llm, PROMPTS[0], tokens[0][:emitted]) == tokens[0][emitted:]
    with engine(model, written, **FEATURES) as llm:
        first, again = asked(llm, PROMPTS), asked(llm, PROMPTS)
        assert [output.token_ids for output in first] == tokens
        assert [output.token_ids for output in again] == tokens
        assert sum(output.cached for output in again) > 0
        scored = asked(llm, PROMPTS, prompt_logprobs=0)
        for output, right in zip(scored, alone, strict=True):
            assert output.prompt_logprobs == pytest.approx(right.prompt_logprobs, abs=NEAR)
            assert output.branches[0].logprobs == pytest.approx(right.branches[0].logprobs, abs=NEAR)
        [several] = asked(llm, PROMPTS[:1], n=3)
        assert [branch.token_ids for branch in several.branches] == [tokens[0]] * 3
        for vector, right in zip(llm.embed(prompt_token_ids=PROMPTS[:2]), vectors, strict=True):
            assert np.allclose(vector.embedding, right.embedding, atol=NEAR)
    with engine(model, written, beam_mode=True) as llm:
        [beams] = asked(llm, PROMPTS[:1], n=3)
        assert len({tuple(branch.token_ids) for branch in beams.branches}) == 3
        assert asked(llm, PROMPTS[2:3])[0].token_ids == tokens[2]


def test_every_scheme_is_among_them() -> None:
    named = [name for written in COMBINATIONS.values() for name in written["mode"] if name in MODES]
    assert {MODES[name].kv for name in named} == {mode.kv for mode in MODES.values()}
    assert {MODES[name].scheme for name in named} == {mode.scheme for mode in MODES.values()}
