"""Closed-loop clients that check every byte while what they are served by changes.

Each client sends its next request when it has the answer to the last one; they name no model. Every answer must be
wholly that of one model, and of one that was in force at some time between its request and its end (`Timeline`).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from harness import Daemon
from long_run import LONG

NATIVE, NATIVE_STREAM, CHAT, CHAT_STREAM = WAYS = ("native", "native stream", "chat", "chat stream")
CLIENTS = 32 if LONG else 12
PAUSE = 0.0 if LONG else 0.25  # seconds of a client between two requests; without it they take what there is of a core
PATIENCE = 120.0  # seconds for one answer; a request that waits longer counts as hung


# --- one request ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    prompt: str
    way: str  # one of WAYS
    tokens: int


@dataclass(frozen=True)
class Answer:
    """All that a client sees of what was generated."""

    text: str
    finish: str
    ids: tuple[int, ...] = ()  # native stream only
    model: str = ""  # as the answer names it; chat only


class Refused(Exception):
    """An answer that is none: another status, an error frame, a stream without its end."""


async def ask(client: httpx.AsyncClient, url: str, question: Question) -> Answer:
    """Raises Refused, httpx.TransportError."""
    if question.way in (NATIVE, NATIVE_STREAM):
        body = {
            "inputs": question.prompt,
            "parameters": {"max_new_tokens": question.tokens, "ignore_eos": True, "do_sample": False},
        }
        if question.way == NATIVE:
            whole = await _post(client, f"{url}/generate", body)
            return Answer(whole["generated_text"][0], whole["finish_reason"])
        return await _native_stream(client, f"{url}/generate_stream", body)
    body = {
        "messages": [{"role": "user", "content": question.prompt}],
        "max_tokens": question.tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    if question.way == CHAT:
        whole = await _post(client, f"{url}/v1/chat/completions", body)
        choice = whole["choices"][0]
        return Answer(choice["message"]["content"], choice["finish_reason"], model=whole["model"])
    return await _chat_stream(client, f"{url}/v1/chat/completions", body | {"stream": True})


async def _post(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post(url, json=body)
    if answer.status_code != 200:
        raise Refused(f"{answer.status_code}: {answer.text[:300]}")
    return answer.json()


async def _native_stream(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Answer:
    ids, texts, finish = [], [], ""
    async for frame in _frames(client, url, body):
        if "token" not in frame:
            raise Refused(f"error frame after {len(ids)} tokens: {frame}")
        ids.append(frame["token"]["id"])
        texts.append(frame["token"]["text"])
        finish = frame["finish_reason"] or finish
    return _complete(Answer("".join(texts), finish, tuple(ids)), len(ids))


async def _chat_stream(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Answer:
    pieces, models, finish = [], set(), ""
    async for frame in _frames(client, url, body):
        if "choices" not in frame:
            raise Refused(f"error frame after {len(pieces)} pieces: {frame}")
        models.add(frame["model"])
        for choice in frame["choices"]:
            pieces.append(choice["delta"].get("content") or "")
            finish = choice["finish_reason"] or finish
    return _complete(Answer("".join(pieces), finish, model=" and ".join(sorted(models))), len(pieces))


def _complete(answer: Answer, pieces: int) -> Answer:
    if not answer.finish:
        raise Refused(f"the stream ended unfinished after {pieces} pieces")
    return answer


async def _frames(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with client.stream("POST", url, json=body) as response:
        if response.status_code != 200:
            raise Refused(f"{response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
                yield json.loads(data)


def client(keep_alive: bool = True) -> httpx.AsyncClient:
    """`keep_alive` false: a connection for each request."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None if keep_alive else 0)
    return httpx.AsyncClient(timeout=PATIENCE, limits=limits, trust_env=False)


# --- what is right when --------------------------------------------------------------------------------------------


@dataclass
class Expected:
    """The greedy answers of each model, taken while nothing else is served."""

    questions: list[Question]
    answers: dict[str, dict[Question, Answer]] = field(default_factory=dict)  # by model, as the test calls it

    def learn(self, model: str, url: str) -> None:
        """Asks the daemon at `url`, which serves `model`; no answer may be that of another model."""

        async def all_of_them() -> list[Answer]:
            async with client() as one:
                return await asyncio.gather(*(ask(one, url, question) for question in self.questions))

        learnt = dict(zip(self.questions, asyncio.run(all_of_them()), strict=True))
        for other, known in self.answers.items():
            same = [question for question in self.questions if known[question] == learnt[question]]
            assert not same, f"{model} answers like {other}: {same}"
        self.answers[model] = learnt

    def models_of(self, question: Question, answer: Answer) -> list[str]:
        return [model for model, known in self.answers.items() if known[question] == answer]


@dataclass
class Reign:
    model: str
    begin: float  # monotonic seconds: the earliest moment at which it may have been in force
    end: float = float("inf")  # and the latest


class Timeline:
    """Which models may have been in force when. A swap's model may be in force from the moment at which the command is
    sent, and is from its return; a swap that fails changes nothing at any time."""

    def __init__(self, model: str) -> None:
        self.reigns = [Reign(model, float("-inf"))]

    @property
    def model(self) -> str:
        return self.reigns[-1].model

    def swapped(self, model: str, sent: float, returned: float) -> None:
        self.reigns[-1].end = returned
        self.reigns.append(Reign(model, sent))

    def possible(self, sent: float, ended: float) -> set[str]:
        return {reign.model for reign in self.reigns if reign.begin <= ended and sent <= reign.end}


@dataclass
class Record:
    client: int
    question: Question
    sent: float
    ended: float = 0.0
    answer: Answer | None = None
    failure: str = ""
    severed: bool = False  # the connection ended before the answer did

    def fault(self, expected: Expected, timeline: Timeline) -> str:
        """What is wrong with it, in words; empty: nothing."""
        where = f"client {self.client}, {self.question.way}, {self.ended - self.sent:.2f} s"
        if self.answer is None:
            return f"{where}: {self.failure}"
        models = expected.models_of(self.question, self.answer)
        possible = timeline.possible(self.sent, self.ended)
        if not models:
            known = {model: answers[self.question] for model, answers in expected.answers.items()}
            return f"{where}: an answer of no model: {self.answer}; known are {known}"
        if not possible & set(models):
            return f"{where}: an answer of {models} while {sorted(possible)} were in force"
        return ""


# --- the clients ---------------------------------------------------------------------------------------------------


class ClosedLoop:
    """`clients` of them in a thread of their own, for as long as the context lasts; its end waits for their last
    answers. Every third opens a connection for each request. A port that refuses is followed by the next one of `urls`,
    as behind a load balancer."""

    def __init__(self, urls: list[str], questions: Iterable[Question], clients: int = CLIENTS) -> None:
        self.urls = urls
        self.questions = list(questions)
        self.clients = clients
        self.records: list[Record] = []  # of requests that have ended
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()))

    def __enter__(self) -> ClosedLoop:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._over.set()
        self._thread.join(PATIENCE + 30)
        assert not self._thread.is_alive(), "clients still wait"

    async def _all(self) -> None:
        await asyncio.gather(*(self._one(number) for number in range(self.clients)))

    async def _one(self, number: int) -> None:
        turns = itertools.islice(itertools.cycle(self.questions), number, None)
        async with client(keep_alive=number % 3 != 2) as mine:
            for question in turns:
                if self._over.is_set():
                    return
                record = Record(number, question, time.monotonic())
                try:
                    async with asyncio.timeout(PATIENCE):
                        record.answer = await self._ask(mine, question)
                except (Refused, httpx.HTTPError, TimeoutError) as failure:
                    record.failure = f"{type(failure).__name__}: {failure}"
                    record.severed = isinstance(failure, httpx.TransportError)
                record.ended = time.monotonic()
                self.records.append(record)
                # A fault that lasts needs no thousands of records.
                await asyncio.sleep(PAUSE if record.answer else max(PAUSE, 0.05))

    async def _ask(self, mine: httpx.AsyncClient, question: Question) -> Answer:
        for url in self.urls:
            try:
                return await ask(mine, url, question)
            except httpx.ConnectError as failure:
                refused = failure
        raise refused

    def wait_for(self, answers: int, timeout: float = 60.0) -> None:
        """Until so many more have come in."""
        wanted, late = len(self.records) + answers, time.monotonic() + timeout
        while len(self.records) < wanted:
            assert time.monotonic() < late, f"{wanted - len(self.records)} answers did not come within {timeout:g} s"
            time.sleep(0.005)

    def faults(self, expected: Expected, timeline: Timeline) -> list[str]:
        return [fault for record in self.records if (fault := record.fault(expected, timeline))]

    def tally(self, expected: Expected) -> Counter[str]:
        """Answers by model."""
        answered = (record for record in self.records if record.answer is not None)
        return Counter(name for record in answered for name in expected.models_of(record.question, record.answer))


# --- the operator --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """One run of lightllmctl. Times are monotonic seconds."""

    words: tuple[str, ...]
    code: int
    output: str
    errors: str
    sent: float
    returned: float

    def __str__(self) -> str:
        return f"lightllmctl {' '.join(self.words)}: exit {self.code}\n{self.output}{self.errors}"


def ctl_command(daemon: Daemon, *words: str) -> list[str]:
    return [sys.executable, "-m", "lightllmctl", "--socket", str(daemon.control), *words]


def ctl(daemon: Daemon, *words: str, timeout: float = 180.0) -> Ran:
    """The real lightllmctl, as a process of its own."""
    sent = time.monotonic()
    done = subprocess.run(
        ctl_command(daemon, *words),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
    )
    return Ran(words, done.returncode, done.stdout, done.stderr, sent, time.monotonic())


@dataclass
class Operator:
    """Swaps and reloads by lightllmctl, and tells the clients' timeline of it."""

    daemon: Daemon
    timeline: Timeline
    ran: list[Ran] = field(default_factory=list)

    def swap(self, target: str, *options: str, model: str | None = None, code: int = 0) -> Ran:
        """`model`: whose answers are right after it, where that changes. Its exit code must be `code`."""
        return self._run("swap", target, *options, model=model, code=code)

    def reload(self, *options: str, code: int = 0) -> Ran:
        return self._run("reload", *options, model=None, code=code)

    def _run(self, *words: str, model: str | None, code: int) -> Ran:
        done = ctl(self.daemon, *words)
        self.ran.append(done)
        assert done.code == code, f"expected exit {code}\n{done}"
        if model is not None and code == 0:
            self.timeline.swapped(model, done.sent, done.returned)
        return done


@contextmanager
def background(daemon: Daemon, *words: str) -> Iterator[subprocess.Popen[str]]:
    """lightllmctl on its way; ended with the context."""
    command = ctl_command(daemon, *words)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def jobs_of(daemon: Daemon) -> list[dict[str, Any]]:
    with daemon.control_client() as control:
        return control.get("/v1/jobs").json()


def kill_candidate(daemon: Daemon) -> None:
    """Ends the engine that is to replace the serving one."""
    (pid,) = [worker["pid"] for worker in daemon.workers("engine") if worker["name"] == "candidate"]
    os.kill(pid, signal.SIGKILL)


def wait_for_phase(daemon: Daemon, words: str, timeout: float = 30.0) -> dict[str, Any]:
    """The running job once its phase holds `words`."""
    late = time.monotonic() + timeout
    while time.monotonic() < late:
        running = (daemon.status() or {"jobs": []})["jobs"]
        if found := next((job for job in running if words in job["phase"]), None):
            return found
        time.sleep(0.002)
    raise AssertionError(f"no job came to a phase like {words!r} within {timeout:g} s: {jobs_of(daemon)[-1:]}")
