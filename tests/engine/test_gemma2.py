"""Gemma 2 from the plan to log-probabilities: longer than its window, decoded, and behind a cached prefix."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from lightllmd import LLM
from model_folders import TOKENIZER
from tiny_models import VARIANTS, transformers_model, write_model

TOLERANCE = 1e-4
WINDOW = VARIANTS["gemma2"]["sliding_window"]
IN_COMMON, PROMPT, NEW = 20, 24, 12  # tokens


def test_log_probabilities_are_those_of_transformers_whole_and_behind_a_cached_prefix(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", VARIANTS["gemma2"])
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    draw = random.Random(3)
    prefix = draw.choices(range(3, 128), k=IN_COMMON)
    prompts = [prefix + draw.choices(range(3, 128), k=PROMPT - IN_COMMON) for _ in range(2)]
    quiet = {"device": "cpu", "threads": 1, "data_type": "float32", "progress": False}
    limits = {"max_req_input_len": 63, "max_req_total_len": 64, "max_total_token_num": 256, "running_max_req_size": 2}
    wanted = {"max_new_tokens": NEW, "ignore_eos": True, "top_logprobs": 3}
    with LLM(str(folder), use_dynamic_prompt_cache=True, **quiet, **limits) as llm:
        [first] = llm.generate(prompt_token_ids=prompts[:1], **wanted)
        [second] = llm.generate(prompt_token_ids=prompts[1:], **wanted)
        [scored] = llm.generate(prompt_token_ids=prompts[:1], prompt_logprobs=2, **wanted)
    assert (first.cached, second.cached) == (0, IN_COMMON)
    assert IN_COMMON > 2 * WINDOW
    assert scored.token_ids == first.token_ids
    model = transformers_model(folder)
    for prompt, output in zip(prompts, (first, second), strict=True):
        ids = torch.tensor([prompt + output.token_ids])
        with torch.inference_mode():
            truth = model(ids).logits[0].log_softmax(-1)
        behind = truth[PROMPT - 1 : -1]
        assert output.token_ids == behind.argmax(-1).tolist()
        (branch,) = output.branches
        assert branch.logprobs == pytest.approx(behind.max(-1).values.tolist(), abs=TOLERANCE)
        best = behind.topk(3, -1).values.tolist()
        for pairs, values in zip(branch.top_logprobs or [], best, strict=True):
            assert [value for _, value in pairs] == pytest.approx(values, abs=TOLERANCE)
        if output is first:
            of_prompt = truth[: PROMPT - 1].gather(-1, ids[0, 1:PROMPT, None])[:, 0]
            assert scored.prompt_logprobs == pytest.approx(of_prompt.tolist(), abs=TOLERANCE)
