"""A spawned engine with the fake back end, and an api worker's end to it, for tests of the process."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lightllmd.config.parameters import Config, EngineSettings, FakeSettings, Params
from lightllmd.config.plan import Budget, DeviceFacts, Plan, encode_plan
from lightllmd.engine.runners.fake_model import fake_token
from lightllmd.ipc import bus, channel, flight_record, messages
from lightllmd.ipc.messages import Heartbeat, Load, SamplingParams, StepOutput, Submit

PATIENCE = 60.0  # seconds; a bound, never a measure


class EngineProcess:
    """A spawned engine and the supervisor's ends of its channels."""

    def __init__(
        self, folder: Path, *, params: dict[str, object] | None = None, slots: int = 4000, **fake: object
    ) -> None:
        metrics = folder / "metrics"
        metrics.mkdir()
        self.metrics = str(metrics)
        self.endpoint = f"ipc://{folder}/engine"
        plan = Plan(
            config=Config(
                params=Params(**(params or {})), engine=EngineSettings(backend="fake", fake=FakeSettings(**fake))
            ),
            model=None,
            device=DeviceFacts("cpu", "test", 1, 1, 1, [], 1),
            derived=[],
            budget=Budget([], 0),
            max_total_token_num=slots,
            batch_max_tokens=slots,
            eos_id=[256],
            data_type="float32",
            tokenizer_mode="fast",
            log_stats_interval=0.05,
            vocab_size=257,
            model_name="fake",
        )
        self.flight_fd = flight_record.create()
        self.link, theirs = channel.pair()
        words = [str(number) for number in (theirs.fileno(), os.getpid(), self.flight_fd)]
        with (folder / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lightllmd.engine", *words],
                pass_fds=[theirs.fileno(), self.flight_fd],
                stderr=stderr,
            )
        theirs.close()
        self.stderr = folder / "stderr"
        self.up: list[messages.Up] = []  # all that it said to the supervisor
        self.link.send(messages.EngineConfigure(encode_plan(plan), 3, 0, self.endpoint, self.metrics, "engine-0"))

    def hear(self, until: Callable[[], object]) -> None:
        """Takes in messages until a condition holds."""
        deadline = time.monotonic() + PATIENCE
        while not until():
            assert time.monotonic() < deadline, (self.up[-3:], self.stderr.read_text())
            select.select([self.link], [], [], 0.05)
            self.up += self.link.receive()

    def phases(self) -> list[str]:
        return list(dict.fromkeys(beat.phase for beat in self.beats()))

    def beats(self) -> list[Heartbeat]:
        return [message for message in self.up if isinstance(message, Heartbeat)]

    def wait_ready(self) -> EngineProcess:
        self.hear(lambda: "ready" in self.phases())
        return self

    def wait_end(self) -> int:
        self.hear(lambda: self.process.poll() is not None)
        self.up += self.link.receive()
        return self.process.returncode

    def flight(self) -> flight_record.Flight:
        return flight_record.read(self.flight_fd)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.link.close()
        os.close(self.flight_fd)
        Path(self.endpoint.removeprefix("ipc://")).unlink(missing_ok=True)


class Api:
    """An api worker's end."""

    def __init__(self, engine: EngineProcess, number: int = 0) -> None:
        self.number = number
        self.socket = bus.ApiSocket(engine.endpoint, number, 1)
        self.heard: list[messages.ToApi] = []

    def submit(self, sequence: int, prompt: str, tokens: int, **fields: object) -> int:
        request = messages.request_id(self.number, 1, sequence)
        params = SamplingParams(max_new_tokens=tokens, **fields.pop("params", {}))
        values = {"branches": list(range(params.n)), "emitted": [[] for _ in range(params.n)]} | fields
        prompt_ids = list(prompt.encode())
        self.socket.send(Submit(request, self.number, 1, time.monotonic_ns(), prompt_ids, params, **values))
        return request

    def hear(self, until: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not until():
            assert time.monotonic() < deadline, self.heard[-3:]
            self.socket.socket.poll(50)
            self.heard += self.socket.receive()

    def tokens(self, request: int, branch: int = 0) -> list[int]:
        """In order; asserts that positions are contiguous."""
        found: list[int] = []
        for output in self.heard:
            if isinstance(output, StepOutput):
                for key, position, token in zip(
                    zip(output.requests, output.branches, strict=True), output.positions, output.tokens, strict=True
                ):
                    if key == (request, branch):
                        assert position == len(found)
                        found.append(token)
        return found

    def loads(self) -> list[Load]:
        return [message for message in self.heard if isinstance(message, Load)]

    def load(self) -> Load | None:
        return next(reversed(self.loads()), None)


Start = Callable[..., EngineProcess]
Connect = Callable[..., Api]


def expected(prompt: str, count: int, seed: int = 0, branch: int = 0, first: int = 0) -> list[int]:
    return [fake_token(list(prompt.encode()), seed, branch, position) for position in range(first, count)]
