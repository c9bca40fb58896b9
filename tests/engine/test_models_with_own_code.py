"""A checkpoint's own modelling code computes on our KV slots, or is refused by name; it runs in no process but the
engine and the one that looks at it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from lightllmd import LLM
from lightllmd.errors import ConfigInvalid
from lightllmd.probe.model import model_facts
from own_causal_lm import write_own_model

QUIET = {"device": "cpu", "threads": 1, "data_type": "float32", "progress": False, "trust_remote_code": True}
LIMITS = {"max_req_input_len": 63, "max_req_total_len": 64, "max_total_token_num": 256, "running_max_req_size": 4}


def test_own_code_gives_its_own_tokens_and_log_probabilities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    from transformers import AutoModelForCausalLM

    folder = write_own_model(tmp_path / "m")
    prompts = [random.Random(seed).choices(range(3, 96), k=9 + 4 * seed) for seed in range(3)]
    with LLM(
        str(folder), use_dynamic_prompt_cache=True, splitfuse_mode=True, splitfuse_block_size=8, **QUIET, **LIMITS
    ) as llm:
        outputs = llm.generate(prompt_token_ids=prompts, max_new_tokens=10, ignore_eos=True)
    truth = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager").eval()
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = truth(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert output.token_ids == logits.argmax(-1).tolist()
        assert output.branches[0].logprobs == pytest.approx(logits.max(-1).values.tolist(), abs=1e-4)


def test_own_code_that_ignores_the_attention_interface_is_refused_by_its_class(tmp_path: Path) -> None:
    folder = write_own_model(tmp_path / "m", interface=False)
    with pytest.raises(ConfigInvalid) as refused:
        model_facts(str(folder), trust_remote_code=True)
    (problem,) = refused.value.problems
    assert problem.message.startswith(f"{folder / 'config.json'}: OwnForCausalLM computes attention")
    assert "transformers' attention interface" in problem.message


def test_own_code_that_attends_to_more_than_its_tokens_is_refused_by_its_class(tmp_path: Path) -> None:
    folder = write_own_model(tmp_path / "m", sink=True)
    with pytest.raises(ConfigInvalid, match="OwnForCausalLM: attention to others than the tokens of its sequence"):
        model_facts(str(folder), trust_remote_code=True)
