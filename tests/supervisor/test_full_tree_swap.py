"""Swaps through the whole process tree, under clients that check every byte: the fake engine, whose tokens depend on
the model's path."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from closed_loop import (
    CLIENTS,
    WAYS,
    ClosedLoop,
    Expected,
    Operator,
    Question,
    Ran,
    Timeline,
    background,
    client,
    ctl,
    jobs_of,
    kill_candidate,
    wait_for_phase,
)
from harness import Daemon, run, stream_frames, wait_for
from lightllmd.engine.runners.fake_model import fake_token
from long_run import LONG
from swap_models import write_fake_models

KILLS = 60 if LONG else 4  # in each way of swapping
SEED = int(os.environ.get("LIGHTLLMD_SEED", "20261124"))
QUESTIONS = [Question(f"question {i}", WAYS[i % 4], 10 + 3 * i) for i in range(8)]
# Exit code of lightllmctl by target: what a swap may be sent to that can't be served.
BROKEN = {"crashing": 9, "hanging": 9, "greedy": 9, "exiting": 9, "misconfigured": 9, "nonesuch": 4}
FAULTS = {
    "crashing": "crash_in_load",
    "hanging": "hang_in_load",
    "greedy": "memory",
    "exiting": "exit_at_boot",
    "misconfigured": "config",
}
FLAGS = (
    *("--engine.fake.tokens_per_second", "150", "--engine.fake.load_seconds", "0.1", "--http.workers", "2"),
    *("--supervisor.load_timeout", "3", "--supervisor.abort_grace", "0.2", "--supervisor.backoff_initial", "0.05"),
)


def daemon_with_models(folder: Path, *flags: str) -> Daemon:
    """Serves `alpha` first; it knows `beta` too, and those that are broken. Not started."""
    models = write_fake_models(folder / "models", "alpha", "beta", **FAULTS)
    daemon = Daemon(folder / "daemon", *FLAGS, "--model_dir", str(models["alpha"]), *flags)
    tables = "".join(f'[models.{name}]\nmodel_dir = "{path}"\n' for name, path in models.items())
    (daemon.folder / "lightllmd.toml").write_text(f'[engine.fake]\nfault_file = "fault"\n{tables}')
    return daemon


def learnt(daemon: Daemon) -> Expected:
    """Each model's answers; `alpha` serves again."""
    expected = Expected(QUESTIONS)
    expected.learn("alpha", daemon.url)
    assert ctl(daemon, "swap", "beta").code == 0
    expected.learn("beta", daemon.url)
    assert ctl(daemon, "swap", "alpha").code == 0
    return expected


def other(model: str) -> str:
    return "beta" if model == "alpha" else "alpha"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["beside", "after"])
def test_swaps_good_and_bad_fail_no_request_and_mix_no_answer(tmp_path: Path, how: str) -> None:
    with daemon_with_models(tmp_path, "--supervisor.swap", how).start() as daemon:
        expected = learnt(daemon)
        before = daemon.status()["requests"]["failed"]
        operator = Operator(daemon, timeline := Timeline("alpha"))
        broken = list(BROKEN) if how == "beside" or LONG else ["crashing", "hanging"]
        good: list[str | None] = [None] * (20 - len(broken) if LONG else 2)
        targets = random.Random(SEED).sample([*good, *broken], len(good) + len(broken))
        with ClosedLoop([daemon.url], QUESTIONS, CLIENTS) as load:
            load.wait_for(2 * CLIENTS)
            for target in targets:
                if target is None:
                    target = other(timeline.model)
                    operator.swap(target, model=target)
                    assert jobs_of(daemon)[-1]["details"]["how"] == how
                else:
                    operator.swap(target, code=BROKEN[target])
                assert daemon.status()["model"]["name"] == timeline.model
                load.wait_for(CLIENTS)
        assert load.faults(expected, timeline) == []
        tally = load.tally(expected)
        assert min(tally["alpha"], tally["beta"]) >= CLIENTS
        status = daemon.wait_ready()
        assert status["requests"]["failed"] == before
        assert daemon.stop() == 0


# --- deaths during a swap ------------------------------------------------------------------------------------------

# (kind of worker, its name or None for any, words of the job's phase in which it is hit)
VICTIMS = [
    ("api", None, "reading"),
    ("api", None, "Loading"),
    ("api", None, "waiting"),
    ("engine", "candidate", "Starting"),
    ("engine", "candidate", "Loading"),
    ("engine", "engine-0", "reading"),
    ("engine", "engine-0", "Starting"),
    ("engine", "engine-0", "Loading"),
    ("engine", None, "waiting"),
    ("engine", "leaving", ""),
]


def hit_during_swap(
    daemon: Daemon, draw: random.Random, target: str, victim: tuple[str, str | None, str]
) -> tuple[str, Ran]:
    """A swap, and a kill in it where its moment comes; a swap is too fast for some."""
    kind, name, words = victim
    number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
    if kind == "api" and number == signal.SIGSTOP:
        number = signal.SIGKILL
    sent, hit = time.monotonic(), ""
    with background(daemon, "swap", target) as process:
        while process.poll() is None and not hit:
            status = daemon.status()
            if any(words in job["phase"] for job in status["jobs"]):
                living = [worker for worker in status["workers"] if worker["kind"] == kind and worker["pid"]]
                wanted = [worker for worker in living if name in (None, worker["name"])]
                if wanted:
                    try:
                        os.kill(draw.choice(wanted)["pid"], number)
                        hit = f"{kind} {name or ''} {words} {signal.Signals(number).name}"
                    except ProcessLookupError:
                        continue
        output = process.communicate(timeout=90)[0]
    return hit or "too late", Ran(("swap", target), process.returncode, output, "", sent, time.monotonic())


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", ["beside", "after"])
def test_a_death_in_any_phase_of_a_swap_ends_in_one_model_or_the_other(tmp_path: Path, how: str) -> None:
    """No request is lost but those of a killed front end, which end; the job has an outcome; the outcome is true."""
    draw, hits, codes = random.Random(SEED), Counter(), Counter()
    flags = ("--supervisor.swap", how, "--supervisor.hang_timeout", "3", "--supervisor.retry_interval", "0.2")
    with daemon_with_models(tmp_path, *flags, "--supervisor.start_limit_burst", "1000").start() as daemon:
        expected = learnt(daemon)
        timeline = Timeline("alpha")
        with ClosedLoop([daemon.url], QUESTIONS, CLIENTS) as load:
            load.wait_for(CLIENTS)
            victims = itertools.chain.from_iterable(draw.sample(VICTIMS, len(VICTIMS)) for _ in itertools.count())
            for victim in itertools.islice(victims, KILLS):
                target = other(timeline.model)
                hit, done = hit_during_swap(daemon, draw, target, victim)
                hits[hit] += 1
                codes[done.code] += 1
                assert done.code in (0, 9), f"{hit}: {done}"
                if done.code == 0:
                    timeline.swapped(target, done.sent, done.returned)
                assert daemon.wait_ready()["model"]["name"] == timeline.model, f"{hit}: {done}"
                load.wait_for(CLIENTS)
        print(dict(hits), dict(codes))
        severed = [record for record in load.records if record.severed]
        load.records = [record for record in load.records if not record.severed]
        assert load.faults(expected, timeline) == []
        assert len(severed) <= CLIENTS * sum(count for hit, count in hits.items() if hit.startswith("api"))
        wait_for(lambda: not daemon.status()["jobs"], what="the end of every job")
        wait_for(lambda: len(daemon.children()) == 3, what="two front ends and one engine alone")
        assert daemon.stop() == 0


# --- one at a time, and the end of all -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Without clients. Each test leaves `alpha` in force."""
    with daemon_with_models(tmp_path_factory.mktemp("quiet")).start() as daemon:
        yield daemon


def test_a_swap_goes_on_without_its_caller_and_refuses_a_second_one(tmp_path: Path) -> None:
    with daemon_with_models(tmp_path, "--supervisor.load_timeout", "60").start() as daemon:
        started = ctl(daemon, "swap", "hanging", "--no-block")
        assert started.code == 0, started
        job = wait_for_phase(daemon, "Loading weights")  # goes on: it was not waited for
        assert (job["verb"], job["target"]) == ("swap", "hanging")
        shown = ctl(daemon, "status").output
        assert "swap hanging" in shown
        assert "Loading weights" in shown
        assert ctl(daemon, "swap", "beta").code == 7
        assert ctl(daemon, "reload").code == 7
        assert ctl(daemon, "swap", "beta", "--plan").code == 7
        kill_candidate(daemon)
        wait_for(lambda: not daemon.status()["jobs"], what="the end of the swap")
        assert jobs_of(daemon)[-1]["outcome"] == "rolled-back"
        assert ctl(daemon, "swap", "beta").code == 0


@pytest.mark.parametrize("how", ["beside", "after"])
def test_a_stop_during_a_swap_ends_everything_at_once(tmp_path: Path, how: str) -> None:
    flags = ("--supervisor.swap", how, "--supervisor.load_timeout", "60")
    with daemon_with_models(tmp_path, *flags).start() as daemon, background(daemon, "swap", "hanging") as swap:
        wait_for_phase(daemon, "Loading weights")
        family = daemon.processes()
        assert daemon.stop(timeout=20) == 0
        output = swap.communicate(timeout=30)[0]
        assert swap.returncode == 1, output
        assert "the daemon stops" in output
        assert not [process for process in family if process.is_running()]


def test_a_plan_says_how_it_would_go_and_changes_nothing(quiet: Daemon) -> None:
    before = quiet.status()
    planned = ctl(quiet, "swap", "beta", "--plan")
    assert planned.code == 0, planned
    assert "beside" in planned.output
    assert "weights" in planned.output
    assert ctl(quiet, "swap", "nonesuch", "--plan").code == 4
    after = quiet.status()
    assert after["model"]["name"] == "alpha"
    same = ("name", "pid", "generation")
    assert [[worker[key] for key in same] for worker in after["workers"]] == [
        [worker[key] for key in same] for worker in before["workers"]
    ]


def test_a_request_names_a_served_model_or_hears_which_one_is(quiet: Daemon) -> None:
    def named(model: str) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
        return httpx.post(f"{quiet.url}/v1/chat/completions", json=body, timeout=30)

    for served in ("beta", "alpha"):
        assert ctl(quiet, "swap", served).code == 0
        assert named(served).status_code == 200
        refused = named(other(served))
        assert refused.status_code == 503
        assert served in refused.text
        unknown = named("gamma")
        assert unknown.status_code == 404
        assert "alpha" in unknown.text
        assert "beta" in unknown.text
        assert served in ctl(quiet, "list-models").output


# --- long answers --------------------------------------------------------------------------------------------------


class LongStream:
    """A stream that is under way for as long as the test likes."""

    def __init__(self, daemon: Daemon, prompt: str, tokens: int) -> None:
        self.prompt, self.tokens = prompt, tokens
        self._url = f"{daemon.url}/generate_stream"
        self.ids: list[int] = []
        self.finish = ""
        self.error = ""

    async def run(self) -> None:
        body = {"inputs": self.prompt, "parameters": {"max_new_tokens": self.tokens, "ignore_eos": True}}
        async with client() as mine:
            async for frame in stream_frames(mine, self._url, body):
                if "token" not in frame:
                    self.error = frame["message"]
                    continue
                if frame["finish_reason"] != "abort":
                    self.ids.append(frame["token"]["id"])
                self.finish = frame["finish_reason"] or self.finish

    def is_of(self, model_dir: Path) -> bool:
        """What has come so far is that model's."""
        prompt = list(self.prompt.encode())
        return self.ids == [fake_token(prompt, 0, 0, at, str(model_dir)) for at in range(len(self.ids))]


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Nothing that this process does ends meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def long_streams(daemon: Daemon, tokens: int) -> tuple[list[LongStream], list[asyncio.Task[None]]]:
    """Four, each with its first token."""
    streams = [LongStream(daemon, f"long {i}", tokens) for i in range(4)]
    tasks = [asyncio.create_task(stream.run()) for stream in streams]
    while not all(stream.ids for stream in streams):
        await asyncio.sleep(0.01)
    return streams, tasks


@pytest.fixture(scope="module", params=["beside", "after"])
def how_and_daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    flags = ("--supervisor.swap", request.param, "--engine.fake.tokens_per_second", "100")
    unnoticed = ("--supervisor.hang_timeout", "600")  # a frozen engine
    long = ("--max_req_total_len", "20000", "--max_total_token_num", "80000")
    with daemon_with_models(tmp_path_factory.mktemp("long"), *flags, *unnoticed, *long).start() as daemon:
        yield request.param, daemon


@pytest.fixture
def old_and_new(how_and_daemon: tuple[str, Daemon]) -> Iterator[tuple[str, Daemon]]:
    """How it swaps from `alpha`, which is in force for each test."""
    yield how_and_daemon
    _, daemon = how_and_daemon
    if daemon.status()["model"]["name"] != "alpha":
        assert ctl(daemon, "swap", "alpha").code == 0


def model_dir(daemon: Daemon, name: str) -> Path:
    return daemon.folder.parent / "models" / name


def assert_answered_by_alpha(daemon: Daemon, streams: list[LongStream], finish: str) -> None:
    for stream in streams:
        assert stream.is_of(model_dir(daemon, "alpha"))
        assert (stream.finish, stream.error) == (finish, "")
        assert len(stream.ids) == stream.tokens or finish == "abort"


def test_a_swap_returns_when_the_old_model_has_answered_all(old_and_new: tuple[str, Daemon]) -> None:
    _, daemon = old_and_new

    async def scenario() -> list[LongStream]:
        old = daemon.pid("engine")
        streams, tasks = await long_streams(daemon, 150)
        with frozen(old):
            swap = asyncio.create_task(asyncio.to_thread(ctl, daemon, "swap", "beta"))
            await asyncio.to_thread(wait_for_phase, daemon, "waiting for 4 requests on alpha")
            assert not any(task.done() for task in (swap, *tasks))
        done = await swap
        assert done.code == 0, done
        assert daemon.status()["requests"]["in_flight"] == 0
        await asyncio.gather(*tasks)
        return streams

    assert_answered_by_alpha(daemon, run(scenario()), "length")
    assert daemon.status()["model"]["name"] == "beta"


def test_streams_outlast_a_drain_timeout_on_the_old_model(old_and_new: tuple[str, Daemon]) -> None:
    """Beside it the new one is in force meanwhile; where it can't be, the swap has failed."""
    how, daemon = old_and_new
    code, model = (0, "beta") if how == "beside" else (9, "alpha")

    async def scenario() -> list[LongStream]:
        old = daemon.pid("engine")
        streams, tasks = await long_streams(daemon, 150)
        with frozen(old):
            done = await asyncio.to_thread(ctl, daemon, "swap", "beta", "--drain", "0.3s")
            assert done.code == code, done
            assert daemon.status()["model"]["name"] == model
            assert not any(task.done() for task in tasks)
        await asyncio.gather(*tasks)
        return streams

    assert_answered_by_alpha(daemon, run(scenario()), "length")
    late = LongStream(daemon, "late", 5)
    run(late.run())
    assert late.is_of(model_dir(daemon, model))


def test_a_forced_swap_cuts_the_streams_of_the_old_model(old_and_new: tuple[str, Daemon]) -> None:
    _, daemon = old_and_new

    async def scenario() -> list[LongStream]:
        streams, tasks = await long_streams(daemon, 15_000)  # of 150 s
        done = await asyncio.to_thread(ctl, daemon, "swap", "beta", "--drain", "0.3s", "--force")
        assert done.code == 0, done
        await asyncio.gather(*tasks)
        return streams

    assert_answered_by_alpha(daemon, run(scenario()), "abort")
    assert daemon.status()["model"]["name"] == "beta"
