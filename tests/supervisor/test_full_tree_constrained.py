"""Constrained streams and streams of tool calls go on, to the character, whatever happens to the engine meanwhile: a
kill, a reload, a swap, one that is rolled back. The fake engine, whose tokens depend on the model's path."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from config_file import Settings, daemon_of_a_file
from harness import Daemon, run, stream_frames
from swap_models import write_fake_models

COLOURS = {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 40, "maxItems": 40}
SCHEMA = {"type": "object", "properties": {"colours": COLOURS}, "required": ["colours"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "paint", "parameters": SCHEMA}}
ASKED: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "painted", "schema": SCHEMA, "strict": True}}},
    {"tools": [TOOL], "tool_choice": "required"},
]
ROOM = {"max_req_input_len": 2000, "max_req_total_len": 4000, "max_total_token_num": 20000}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Settings]]:
    """`alpha` is in force for each test."""
    folder = tmp_path_factory.mktemp("constrained")
    models = write_fake_models(folder / "models", "alpha", "beta", crashing="crash_in_load")
    settings = {
        "model_dir": str(models["alpha"]),
        "engine.backend": "fake",
        "engine.fake.fault_file": "fault",
        "engine.fake.tokens_per_second": 400,
        "supervisor.backoff_initial": 0.05,
        **ROOM,
        **{f"models.{name}.model_dir": str(path) for name, path in models.items()},
    }
    daemon, file = daemon_of_a_file(folder / "daemon", settings)
    with daemon.start():
        yield daemon, file


class Streams:
    """One of each kind; `act` is called once, when all have begun and none has ended."""

    def __init__(self, daemon: Daemon, act: Callable[[], None] | None = None) -> None:
        self._url, self._act = f"{daemon.url}/v1/chat/completions", act
        self._begun = [asyncio.Event() for _ in ASKED]
        self._ended = 0
        self.ended_before = 0  # how many streams, when the act began

    async def texts(self) -> list[str]:
        async with httpx.AsyncClient(timeout=120) as client:
            told, _ = await asyncio.gather(
                asyncio.gather(*(self._text(client, number) for number in range(len(ASKED)))), self._acted()
            )
        return list(told)

    async def _acted(self) -> None:
        for one in self._begun:
            await one.wait()
        self.ended_before = self._ended
        if self._act:
            await asyncio.to_thread(self._act)

    async def _text(self, client: httpx.AsyncClient, number: int) -> str:
        """Of content, or of a call's arguments; what a client puts together."""
        body = {
            "model": "alpha",
            "messages": [{"role": "user", "content": "Paint."}],
            "max_tokens": 1500,
            "temperature": 0,
        }
        text, finish = "", None
        async for frame in stream_frames(client, self._url, body | ASKED[number] | {"model": "alpha", "stream": True}):
            for choice in frame["choices"]:
                for call in choice["delta"].get("tool_calls") or ():
                    text += call["function"].get("arguments") or ""
                text += choice["delta"].get("content") or ""
                finish = choice["finish_reason"] or finish
            if len(text) > 30:
                self._begun[number].set()
        assert finish == ("tool_calls" if "tools" in ASKED[number] else "stop")
        self._ended += 1
        return text


@pytest.fixture(scope="module")
def unbroken(served: tuple[Daemon, Settings]) -> list[str]:
    texts = run(Streams(served[0]).texts())
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    return texts


def job(daemon: Daemon, verb: str, **asked: Any) -> str:
    """Its outcome."""
    with daemon.control_client() as control:
        number = control.post(f"/v1/{verb}", json=asked).json()["id"]
        return json.loads(control.get(f"/v1/jobs/{number}").text.splitlines()[-1])["outcome"]


def kill(daemon: Daemon, file: Settings) -> None:
    daemon.kill("engine")


def reload(daemon: Daemon, file: Settings) -> None:
    file.in_force = file.write({"running_max_req_size": 77})
    assert job(daemon, "reload") == "done"


def bad_reload(daemon: Daemon, file: Settings) -> None:
    fault = Path(file.in_force["model_dir"], "fault")
    fault.write_text("crash_in_load")
    file.write({"running_max_req_size": 55})
    assert job(daemon, "reload") == "rolled-back"
    file.write({})
    fault.unlink()


def bad_swap(daemon: Daemon, file: Settings) -> None:
    assert job(daemon, "swap", model="crashing") == "rolled-back"


def swap(daemon: Daemon, file: Settings) -> None:
    assert job(daemon, "swap", model="beta") == "done"


@pytest.mark.parametrize(
    ("act", "how"),
    [(kill, ""), (bad_swap, "beside"), (bad_reload, "after"), (reload, ""), (swap, ""), (swap, "beside")],
    ids=["kill", "swap rolled back", "reload rolled back", "reload", "swap after", "swap beside"],
)
def test_what_is_constrained_goes_on_to_the_character(
    served: tuple[Daemon, Settings], unbroken: list[str], act: Callable[[Daemon, Settings], None], how: str
) -> None:
    """`how`: that of a swap from now on; empty: as it was."""
    daemon, file = served
    if how:
        file.in_force = file.write({"supervisor.swap": how})
        assert job(daemon, "reload") == "done"
    streams = Streams(daemon, lambda: act(daemon, file))
    assert run(streams.texts()) == unbroken
    assert not streams.ended_before
    assert daemon.status()["requests"]["failed"] == 0
    if act is swap:
        assert daemon.status()["model"]["name"] == "beta"
        if how == "":
            assert job(daemon, "swap", model="alpha") == "done"
