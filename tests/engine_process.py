"""A spawned engine with the fake back end, and an api worker's end to it, for tests of the process."""

from __future__ import annotations

import os
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
from lightllmd.ipc.waiting import wait_ready

PATIENCE = 60.0  # seconds; a bound, never a measure


class RankProcess:
    """A spawned rank of an engine and the supervisor's ends of its channels."""

    def __init__(self, stderr: Path) -> None:
        self.flight_fd = flight_record.create()
        self.link, theirs = channel.pair()
        words = [str(number) for number in (theirs.fileno(), os.getpid(), self.flight_fd)]
        with stderr.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lightllmd.engine", *words],
                pass_fds=[theirs.fileno(), self.flight_fd],
                stderr=file,
            )
        theirs.close()
        self.stderr = stderr
        self.up: list[messages.Up] = []  # all that it said to the supervisor

    def phases(self) -> list[str]:
        return list(dict.fromkeys(beat.phase for beat in self.beats()))

    def beats(self) -> list[Heartbeat]:
        return [message for message in self.up if isinstance(message, Heartbeat)]

    def failures(self) -> list[str]:
        return [message.kind for message in self.up if isinstance(message, messages.Failed)]

    def flight(self) -> flight_record.Flight:
        return flight_record.read(self.flight_fd)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.link.close()
        os.close(self.flight_fd)


def fake_plan(params: dict[str, object], slots: int, ranks: int, **fake: object) -> Plan:
    return Plan(
        config=Config(params=Params(**params), engine=EngineSettings(backend="fake", fake=FakeSettings(**fake))),
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
        ranks=ranks,
    )


class EngineProcess(RankProcess):
    """A spawned engine: rank 0, and the others that follow it."""

    def __init__(
        self,
        folder: Path,
        *,
        params: dict[str, object] | None = None,
        slots: int = 4000,
        ranks: int = 1,
        plan: Plan | None = None,
        **fake: object,
    ) -> None:
        """`plan`: of another back end than the fake one."""
        super().__init__(folder / "stderr")
        self.others = [RankProcess(folder / f"stderr-{rank}") for rank in range(1, ranks)]
        metrics = folder / "metrics"
        metrics.mkdir()
        self.metrics = str(metrics)
        self.endpoint = f"ipc://{folder}/engine"
        encoded = encode_plan(plan or fake_plan(params or {}, slots, ranks, **fake))
        for rank, process in enumerate(self.all):
            first = messages.EngineConfigure(
                encoded, 3, rank, self.endpoint, self.metrics, f"engine-{rank}", ranks=ranks
            )
            process.link.send(first)

    @property
    def all(self) -> list[RankProcess]:
        """By rank."""
        return [self, *self.others]

    def hear(self, until: Callable[[], object]) -> None:
        """Takes in messages until a condition holds."""
        deadline = time.monotonic() + PATIENCE
        while not until():
            assert time.monotonic() < deadline, [(one.up[-3:], one.stderr.read_text()) for one in self.all]
            wait_ready([one.link for one in self.all if not one.link.closed], 0.05)
            for one in self.all:
                one.up += one.link.receive()

    def wait_ready(self) -> EngineProcess:
        self.hear(lambda: all("ready" in one.phases() for one in self.all))
        return self

    def wait_end(self) -> int:
        self.hear(lambda: all(one.process.poll() is not None for one in self.all))
        for one in self.all:
            one.up += one.link.receive()
        return self.process.returncode

    def close(self) -> None:
        for one in self.others:
            one.close()
        super().close()
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
