"""Kills across the whole process tree, with clients that check every byte."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import httpx
import pytest

from harness import Daemon, Killer, generate_stream, run, wait_for
from leftovers import wait_ended
from lightllmd.engine.runners.fake_model import fake_token
from lightllmd.engine.scheduling.grammar_rows import CompiledGrammars
from lightllmd.grammar.compiler import GrammarCompiler
from lightllmd.grammar.ebnf.translation import translated
from lightllmd.ipc.messages import Grammar, SamplingParams
from lightllmd.text import ByteTokenizer
from lightllmd.text.healing import writable
from long_run import LONG

STREAMS = 64 if LONG else 16
OVERLAP = ("--engine.fake.overlap", "true")
TOKENS = 200
PATTERN = "([a-z]{2}[0-9]-?)+"
HANGS = ("--supervisor.hang_timeout", "3")  # a worker that the machine is busy for is late by less
FAST_FAKE = ("--engine.fake.tokens_per_second", "100", "--engine.fake.load_seconds", "0.1")


def expected(prompt: str, tokens: int, branch: int = 0) -> list[int]:
    return [fake_token(list(prompt.encode()), 0, branch, position) for position in range(tokens)]


@pytest.mark.parametrize(
    ("number", "kills", "flags"),
    [(signal.SIGKILL, 5, ()), (signal.SIGKILL, 5, OVERLAP), (signal.SIGSTOP, 3, (*OVERLAP, *HANGS))],
    ids=["SIGKILL", "SIGKILL overlapped", "SIGSTOP overlapped"],
)
def test_killed_worker_loses_no_stream(tmp_path: Path, number: int, kills: int, flags: tuple[str, ...]) -> None:
    flags = (*FAST_FAKE, *flags)
    with Daemon(tmp_path, *flags, "--supervisor.abort_grace", "0.2") as daemon:
        killer = Killer(daemon, number, kills, STREAMS * TOKENS, seed=int(number))

        async def all_streams() -> list[tuple[list[int], str]]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(timeout=120, limits=limits) as client:
                streams = [generate_stream(client, daemon.url, f"p{i}", TOKENS, killer) for i in range(STREAMS)]
                return await asyncio.gather(*streams)

        answers = run(all_streams())
        assert len(killer.killed) == kills
        for i, (ids, text) in enumerate(answers):
            assert ids == expected(f"p{i}", TOKENS)
            assert text == bytes(ids).decode()
        status = daemon.status()
        assert status["requests"]["failed"] == 0
        assert daemon.stop() == 0


def expected_of(pattern: str, prompt: str, tokens: int) -> bytes:
    """What is generated of the text that a pattern matches."""
    compiler = GrammarCompiler(writable(ByteTokenizer()), 257, [256])
    grammar = translated(Grammar("regex", pattern), "pattern")
    row = CompiledGrammars(lambda: compiler).row(SamplingParams(grammar=grammar, ignore_eos=True))
    text = b""
    while len(text) < tokens:
        text += bytes([fake_token(list(prompt.encode()), 0, 0, len(text), mask=row.mask(list(text)))])
    return text


def test_killed_worker_loses_no_branch_no_plain_answer_and_no_constrained_one(tmp_path: Path) -> None:
    """n = 4, non-streaming requests and those that are held to a pattern go on like streams."""
    with Daemon(tmp_path, *FAST_FAKE, *OVERLAP) as daemon:
        killer = Killer(daemon, signal.SIGKILL, 3, 16 * TOKENS, seed=4)

        async def plain(client: httpx.AsyncClient, prompt: str, n: int, **more: str) -> list[str]:
            parameters = {"max_new_tokens": TOKENS, "ignore_eos": True, "best_of": n, **more}
            answer = await client.post(f"{daemon.url}/generate", json={"inputs": prompt, "parameters": parameters})
            assert answer.status_code == 200, answer.text
            return answer.json()["generated_text"]

        async def all_requests() -> list[object]:
            async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
                streams = [generate_stream(client, daemon.url, f"s{i}", TOKENS, killer) for i in range(16)]
                return await asyncio.gather(
                    *streams,
                    *(plain(client, f"one{i}", 1) for i in range(8)),
                    *(plain(client, f"n{i}", 4) for i in range(8)),
                    *(plain(client, f"held{i}", 1, regular_constraint=PATTERN) for i in range(4)),
                )

        answers = run(all_requests())
        assert len(killer.killed) == 3
        for i in range(16):
            assert answers[i][0] == expected(f"s{i}", TOKENS)
        for i in range(8):
            assert answers[16 + i] == [bytes(expected(f"one{i}", TOKENS)).decode()]
            assert answers[24 + i] == [bytes(expected(f"n{i}", TOKENS, branch)).decode() for branch in range(4)]
        for i in range(4):
            assert answers[32 + i] == [expected_of(PATTERN, f"held{i}", TOKENS).decode()]


@pytest.mark.parametrize(
    ("way", "overlap"),
    [("SIGSEGV", ()), ("SIGSEGV", OVERLAP), ("exception", ()), ("hang", (*OVERLAP, *HANGS))],
    ids=["SIGSEGV", "SIGSEGV overlapped", "exception", "hang overlapped"],
)
def test_poison_request_gets_its_500_and_the_others_finish(tmp_path: Path, way: str, overlap: tuple[str, ...]) -> None:
    flags = (*FAST_FAKE, *overlap, "--engine.fake.poison", "arsenic", "--engine.fake.poison_way", way)
    with Daemon(tmp_path, *flags, "--supervisor.abort_grace", "0.2") as daemon:

        async def poison(client: httpx.AsyncClient) -> httpx.Response:
            return await client.post(f"{daemon.url}/generate", json={"inputs": "some arsenic please"})

        async def all_requests() -> list[object]:
            async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
                prompts = [f"q{i}" for i in range(STREAMS - 1)]
                streams = [generate_stream(client, daemon.url, prompt, TOKENS, lambda: None) for prompt in prompts]
                return await asyncio.gather(*streams[:15], poison(client), *streams[15:])

        answers = run(all_requests())
        guilty = answers.pop(15)
        assert guilty.status_code == 500, guilty.text
        assert "message" in guilty.json()
        for i, (ids, _) in enumerate(answers):
            assert ids == expected(f"q{i}", TOKENS)
        assert daemon.wait_ready()["requests"]["failed"] == 1


def test_killed_front_end_refuses_no_connection_and_its_slots_come_back(tmp_path: Path) -> None:
    with Daemon(tmp_path, *FAST_FAKE) as daemon:

        async def scenario() -> None:
            async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
                started = asyncio.Event()
                doomed = [
                    asyncio.ensure_future(generate_stream(client, daemon.url, f"d{i}", 2000, started.set))
                    for i in range(8)
                ]
                await started.wait()
                first = daemon.kill("api")
                # Connections made while no front end lives wait in the supervisor's listener.
                late = await asyncio.gather(
                    *(generate_stream(client, daemon.url, f"l{i}", 20, lambda: None) for i in range(8))
                )
                for i, (ids, _) in enumerate(late):
                    assert ids == expected(f"l{i}", 20)
                ended = await asyncio.gather(*doomed, return_exceptions=True)
                assert all(isinstance(failure, Exception) for failure in ended), (
                    "a killed front end's streams end, never hang"
                )
                assert daemon.pid("api") != first

        run(scenario())
        wait_for(lambda: daemon.status()["model"]["kv_slots_used"] == 0, what="slots of the dead front end's requests")


def test_killed_supervisor_leaves_nothing_and_the_next_start_clears_up(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, *FAST_FAKE).start()
    shm = set(os.listdir("/dev/shm"))
    family = daemon.processes()
    daemon.process.kill()
    daemon.process.wait()
    wait_ended(family[1:])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", daemon.port)) != 0, "its port is bound"
    wait_for(lambda: set(os.listdir("/dev/shm")) <= shm, what="no new file in /dev/shm")
    assert daemon.control.exists(), "a killed process can't unlink its socket; the next start has to"
    with Daemon(tmp_path, *FAST_FAKE, port=daemon.port) as again:
        answer = httpx.post(
            f"{again.url}/generate", json={"inputs": "x", "parameters": {"max_new_tokens": 3}}, timeout=30
        )
        assert answer.json()["generated_text"] == [bytes(expected("x", 3)).decode()]
        assert again.stop() == 0
    assert not list(tmp_path.rglob("*.sock"))
