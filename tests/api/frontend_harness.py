"""An api worker inside the test's own event loop, with a scripted engine at the other end of real ZeroMQ sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from array import array
from collections.abc import Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import msgspec

import lateness
from fake_embeddings import SIZE, fake_embedding
from lightllmd.api import server
from lightllmd.api.inflight.ledger import Ledger
from lightllmd.api.worker import ApiWorker
from lightllmd.config import keys
from lightllmd.config.parameters import (
    Config,
    EngineSettings,
    HttpSettings,
    ImagesSettings,
    Params,
    SupervisorSettings,
)
from lightllmd.config.plan import Budget, DeviceFacts, Plan, Pooling, PromptEmbedding, Scoring, Vision, encode_plan
from lightllmd.engine.runners.fake_model import fake_score, fake_token
from lightllmd.ipc import channel, messages
from lightllmd.ipc.bus import EngineSocket
from lightllmd.ipc.messages import FINISH_LENGTH, FINISH_NONE, FINISH_STOP

EOS = 256
PATIENCE = 60.0  # seconds; a bound, never a measure


def make_plan(
    params: dict[str, Any] | None = None,
    model: str = "fake-model",
    names: Iterable[str] = (),
    scoring: Scoring | None = None,
    pooling: Pooling | None = None,
    sees: bool = False,
    images: dict[str, Any] | None = None,
    **http: Any,
) -> Plan:
    """`sees`: requests may bring images, under the settings `images`. `scoring`: of a reward model; `pooling`: of any
    other, whose embeddings have SIZE values."""
    settings = HttpSettings(**http)
    read = {setting: keys.read(path) for setting, path in settings.key_files.items()}
    ring = keys.ring(read.get("http.api_keys_file"), read.get("http.metrics_key"), settings.metrics_key)
    config = Config(
        held_keys=ring,
        models={name: {} for name in names},
        params=Params(**({"max_total_token_num": 6000, "enable_multimodal": sees} | (params or {}))),
        http=settings,
        images=ImagesSettings(**(images or {})),
        engine=EngineSettings(backend="fake"),
        supervisor=SupervisorSettings(stop_timeout=4.0),
    )
    return Plan(
        config=config,
        model=None,
        device=DeviceFacts("cpu", "test", 1, 1 << 30, 1 << 30, ["float32"], 2),
        derived=[],
        budget=Budget([], 0),
        max_total_token_num=6000,
        batch_max_tokens=6000,
        eos_id=[EOS],
        data_type="float32",
        tokenizer_mode="fast",
        log_stats_interval=10.0,
        vocab_size=257,
        scoring=scoring,
        vision=Vision("float32", 4, 32, 4, 200) if sees else None,
        embedding=PromptEmbedding(pooling or Pooling("last", unit=True), SIZE) if scoring is None else None,
        model_name=model,
    )


def expected(prompt: str, count: int, *, seed: int = 0, branch: int = 0) -> str:
    """The text of a fake generation; seed 0 is greedy."""
    ids = list(prompt.encode())
    return bytes(fake_token(ids, seed, branch, position) for position in range(count)).decode()


def fake_tokens(submit: messages.Submit, branch: int, position: int) -> int:
    seed = submit.params.seed if submit.params.do_sample else 0
    return fake_token(submit.prompt_ids, seed, branch, position)


def prompt_parts(submit: messages.Submit, size: int = 3) -> list[messages.PromptLogprobs]:
    """In parts of `size` tokens: token i has -i / 8; the alternatives are the ids from 65 on, with -1, -2, …"""
    prompt, alternatives = submit.prompt_ids, submit.params.prompt_logprobs
    others = [(65 + rank, -1.0 - rank) for rank in range(alternatives)]
    parts = []
    for first in range(1, len(prompt), size):
        logprobs = [-index / 8 for index in range(first, min(first + size, len(prompt)))]
        told = [others for _ in logprobs] if alternatives else None
        parts.append(messages.PromptLogprobs(submit.request, first, logprobs, told))
    return parts


def fake_vectors(submit: messages.Submit, labels: int) -> list[bytes]:
    """As the fake engine's: without labels an embedding."""
    prompt, at = submit.prompt_ids, submit.params.at
    if not labels:
        return [array("f", fake_embedding(prompt, submit.params)).tobytes()]
    places = [len(prompt) - 1] if at is None else at
    return [array("f", [fake_score(prompt[: end + 1], label) for label in range(labels)]).tobytes() for end in places]


class ScriptedEngine:
    """Speaks a generation's part. `token` chooses each token; nothing moves unless `step` is called or `free_run`."""

    def __init__(
        self,
        folder: Path,
        generation: int,
        token: Callable[[messages.Submit, int, int], int] = fake_tokens,
    ) -> None:
        self.generation = generation
        self.endpoint = f"ipc://{folder}/e{generation}"
        self.file = folder / f"e{generation}"
        self.socket = EngineSocket(self.endpoint)
        self.token = token
        self.heard: list[messages.ToEngine] = []
        self.running: dict[int, tuple[messages.Submit, dict[int, int]]] = {}  # request -> branch -> next position
        self.reject: messages.Rejected | None = None
        self.free_run = False
        self.logprob: Callable[[int, int], float] = lambda branch, position: -0.5
        self.others: Callable[[int], list[tuple[int, float]]] = lambda token: [(token, -0.5), (65, -1.5), (66, -2.5)]
        self.cached = 0  # prompt tokens that each request is said to have found in the prompt cache
        self.labels = 1  # of each vector, where that is what is asked for; 0: embeddings
        self._task = asyncio.create_task(self._run())

    def __repr__(self) -> str:
        return f"generation {self.generation}"

    async def _run(self) -> None:
        while True:
            self.listen()
            if self.free_run:
                self.step(at_once=1 if lateness.drawn is None else lateness.drawn.tokens())
            await asyncio.sleep(0.0005)

    def listen(self) -> None:
        for message in self.socket.receive():
            self.heard.append(message)
            if isinstance(message, messages.Submit):
                if self.reject is not None:
                    refusal = msgspec.structs.replace(self.reject, request=message.request)
                    self.socket.send(message.api, message.epoch, refusal)
                    continue
                positions = {b: len(e) for b, e in zip(message.branches, message.emitted, strict=True)}
                self.running[message.request] = (message, positions)
            elif isinstance(message, messages.Abort) and message.request in self.running:
                _, positions = self.running[message.request]
                for branch in list(positions) if message.branches is None else message.branches:
                    positions.pop(branch, None)
                if not positions:
                    del self.running[message.request]

    @property
    def submits(self) -> list[messages.Submit]:
        return [message for message in self.heard if isinstance(message, messages.Submit)]

    @property
    def aborts(self) -> list[messages.Abort]:
        return [message for message in self.heard if isinstance(message, messages.Abort)]

    async def submitted(self, count: int) -> None:
        await until(lambda: len(self.submits) >= count)

    def step(self, only: set[int] | None = None, at_once: int = 1) -> int:
        """One token for each running branch (of the requests in `only`), or several of each in one message."""
        rows: list[tuple[int, int, int, int, float, int]] = []
        prompts: list[messages.PromptLogprobs] = []
        cached: list[tuple[int, int]] = []
        pooled: list[messages.Pooled] = []
        owner = (0, 1)
        for request, (submit, positions) in list(self.running.items()):
            if only is not None and request not in only:
                continue
            if submit.params.prompt_logprobs >= 0 and not any(positions.values()):
                prompts += prompt_parts(submit)
            if self.cached and not any(positions.values()):
                cached.append((request, self.cached))
            if isinstance(submit.params, messages.PoolingParams):
                pooled.append(messages.Pooled(request, fake_vectors(submit, self.labels)))
                del self.running[request]
                continue
            for branch in list(positions) * at_once:
                if (position := positions.get(branch)) is None:
                    continue
                token = self.token(submit, branch, position)
                finish = FINISH_NONE
                if token == EOS and not submit.params.ignore_eos:
                    finish = FINISH_STOP
                elif position + 1 == submit.params.max_new_tokens:
                    finish = FINISH_LENGTH
                rows.append((request, branch, position, token, self.logprob(branch, position), finish))
                if finish == FINISH_NONE:
                    positions[branch] = position + 1
                else:
                    del positions[branch]
            if not positions:
                del self.running[request]
        if rows:
            requests, branches, at, tokens, logprobs, finishes = (list(column) for column in zip(*rows, strict=True))
            others = [self.others(token) for token in tokens]
            output = messages.StepOutput(self.generation, requests, branches, at, tokens, logprobs, finishes, others)
            output.cached, output.prompts = cached, prompts
            self.socket.send(*owner, output)
        if pooled:
            output = messages.StepOutput(self.generation, [], [], [], [], [], [], cached=cached, pooled=pooled)
            self.socket.send(*owner, output)
        return len(rows) + len(pooled)

    def die(self) -> None:
        if not self.socket.socket.closed:
            self._task.cancel()
            self.socket.close()
            self.file.unlink(missing_ok=True)


async def until(condition: Callable[[], Any]) -> Any:
    async with asyncio.timeout(PATIENCE):
        while not (value := condition()):
            await asyncio.sleep(0.002)
        return value


class Stack:
    """One worker, its supervisor's end, an HTTP client."""

    def __init__(self, folder: Path, plan: Plan, tls: messages.Tls | None = None) -> None:
        self.folder = folder
        self.plan = plan
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.supervisor, theirs = channel.pair()
        fds = [self.listener.detach()]
        configure = messages.ApiConfigure(encode_plan(plan), 0, 1, fds, str(folder), "api-0", tls=tls)
        configure.store_dir = str(folder)
        self.worker = ApiWorker(channel.Channel(theirs, messages.decode_down), configure, plan)
        self.running = asyncio.create_task(self.worker.run())
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE)
        self.engine: ScriptedEngine | None = None  # the newest
        self.engines: list[ScriptedEngine] = []
        self.generation = 0
        self.said: list[messages.Up] = []  # other than heartbeats

    @property
    def ledger(self) -> Ledger:
        """Of the revision in force."""
        return self.worker.revisions.current.ledger

    @property
    def stats(self) -> dict[str, float]:
        return self.worker.revisions.stats()

    def tell(self, message: messages.Down) -> None:
        assert self.supervisor.send(message)

    async def answer(self, kind: type[messages.Prepared] | type[messages.Probed], number: int) -> Any:
        """What the worker said of that revision or probe."""

        def heard() -> Any:
            self.said += [m for m in self.supervisor.receive() if not isinstance(m, messages.Heartbeat)]
            numbers = {messages.Prepared: "revision", messages.Probed: "number"}
            return next((m for m in self.said if isinstance(m, kind) and getattr(m, numbers[kind]) == number), None)

        return await until(heard)

    def launch(self, revision: int = 1, replica: int = 0, **options: Any) -> ScriptedEngine:
        """The next generation, one of several side by side with `replica`; the worker is told of it."""
        self.generation += 1
        self.engine = ScriptedEngine(self.folder, self.generation, **options)
        self.engines.append(self.engine)
        self.tell(messages.EngineUp(self.generation, self.engine.endpoint, revision, replica))
        return self.engine

    async def up(self, revision: int = 1, replica: int = 0, **options: Any) -> ScriptedEngine:
        """The next generation, ready and connected."""
        engine = self.launch(revision, replica, **options)
        self.tell(messages.Health(True, "ready"))
        await until(lambda: any(isinstance(m, messages.Hello) for m in engine.heard) and self.healthy)
        return engine

    async def prepare(self, revision: int, plan: Plan) -> None:
        self.tell(messages.Prepare(revision, encode_plan(plan)))
        assert (await self.answer(messages.Prepared, revision)).error == ""

    async def expire(self, streams: int) -> None:
        """What is held has been so for too long, now that so many streams have begun to answer."""
        await until(lambda: sum(stream.started for stream in self.worker.revisions.streams) >= streams)
        self.ledger.hold_timeout = 0.4

    async def token(self) -> None:
        """Returns when a running request has one."""
        await until(lambda: any(branch.ids for entry in self.ledger.entries for branch in entry.branches))

    @property
    def healthy(self) -> bool:
        return self.worker.revisions.health.ready

    async def kill(self, unproven: list[int] | None = None, *, quarantined: int = 0) -> None:
        assert self.engine is not None
        self.engine.die()
        self.engine = None
        self.tell(messages.Health(False, "the engine died"))
        self.tell(messages.EngineDown(self.generation, "killed", unproven or [], quarantined))
        await until(lambda: not self.ledger.connected)

    async def kill_one(self, engine: ScriptedEngine, unproven: list[int] | None = None) -> None:
        """One of several side by side; the others serve on."""
        engine.die()
        self.tell(messages.EngineDown(engine.generation, "killed", unproven or []))
        await until(lambda: self.ledger.groups.of(engine.generation) is None)

    async def stop(self) -> None:
        for engine in self.engines:
            engine.die()
        await self.client.aclose()
        if not self.running.done():
            self.tell(messages.Stop())
        with patch.object(server, "_SETTLE", 0.0):  # no connection is on its way
            async with asyncio.timeout(PATIENCE):
                await self.running
        self.supervisor.close()

    async def generate(self, prompt: str, **parameters: Any) -> httpx.Response:
        return await self.client.post("/generate", json={"inputs": prompt, "parameters": parameters})


@asynccontextmanager
async def stack(
    folder: Path,
    params: dict[str, Any] | None = None,
    *,
    engine: bool = True,
    plan: Plan | None = None,
    tls: messages.Tls | None = None,
    **http: Any,
):
    """A worker, by default with a generation that runs freely."""
    one = Stack(folder, plan or make_plan(params, **http), tls)
    try:
        if engine:
            (await one.up()).free_run = True
        yield one
    finally:
        await one.stop()


def run(coroutine: Any) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(120):
            return await coroutine

    return asyncio.run(bounded())


def frames(body: str) -> list[dict[str, Any]]:
    """The JSON frames of a whole SSE body, comments and [DONE] left out."""
    found = []
    for block in body.split("\n\n"):
        if block.startswith("data:") and block[5:].strip() != "[DONE]":
            found.append(json.loads(block[5:]))
    return found
