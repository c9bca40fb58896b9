"""The prompt cache over the control socket: what it holds, and a flush that ends when the engine has done it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness import wait_for
from lightllmd.supervisor import snapshot
from stand_ins import StandInDaemon

STATS = {
    "slots_total": 6000,
    "cache_tokens": 705,
    "cache_evictable": 700,
    "cache_lookups_tokens": 2000,
    "cache_hits_tokens": 1500,
    "cache_evicted_tokens": 30,
    "cache_flushes": 1,
    "cache_flushed_tokens": 40,
}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandInDaemon]:
    with StandInDaemon(tmp_path_factory.mktemp("cache"), "--use_dynamic_prompt_cache") as daemon:
        yield daemon


@pytest.fixture(autouse=True)
def told(daemon: StandInDaemon) -> None:
    """The engine says what STATS says."""
    daemon.order("live", engine=STATS)
    wait_for(lambda: (daemon.status()["cache"] or {}).get("tokens") == 705, 30, "the engine's word")


def engine(daemon: StandInDaemon) -> str:
    return f"engine-{daemon.status()['generation']}"


def job(daemon: StandInDaemon, number: int) -> dict[str, Any]:
    with daemon.control_client() as client:
        return next(job for job in client.get("/v1/jobs").json() if job["id"] == number)


def test_what_the_engine_says_is_what_is_told(daemon: StandInDaemon) -> None:
    with daemon.control_client() as client:
        answer = client.get("/v1/cache")
    assert answer.status_code == 200
    cache = msgspec.json.decode(answer.content, type=snapshot.Cache)
    assert msgspec.to_builtins(cache) == daemon.status()["cache"] == {
        "tokens": 705, "evictable": 700, "kv_slots_total": 6000,
        "lookup_tokens": 2000, "hit_tokens": 1500, "evicted_tokens": 30,
    }  # fmt: skip


def test_a_flush_ends_with_the_engines_count(daemon: StandInDaemon) -> None:
    asked = daemon.ask("cache/flush")
    assert daemon.wait_heard(engine(daemon), "FlushCache")
    assert job(daemon, asked.json()["id"])["outcome"] is None
    busy = daemon.ask("restart", {"worker": "engine"})
    assert (busy.status_code, busy.json()["error"]) == (409, "Busy")
    done = {"cache_tokens": 5, "cache_evictable": 0, "cache_flushes": 2, "cache_flushed_tokens": 740}
    daemon.order("live", engine=STATS | done)
    ended = daemon.wait_job(asked)
    assert (ended["verb"], ended["outcome"]) == ("flush-cache", "done")
    assert ended["message"] == "700 tokens forgotten; requests use 5 more"


def test_a_flush_goes_on_beside_a_drain(daemon: StandInDaemon) -> None:
    daemon.order("live", engine=STATS, api={"in_flight": 3})
    wait_for(lambda: daemon.status()["requests"]["in_flight"] == 3, 30, "requests in flight")
    draining = daemon.ask("drain")
    asked = daemon.ask("cache/flush")
    daemon.order("live", engine=STATS | {"cache_tokens": 0, "cache_flushes": 2, "cache_flushed_tokens": 745})
    assert daemon.wait_job(asked)["message"] == "705 tokens forgotten"
    assert daemon.wait_job(draining)["outcome"] == "done"
    assert daemon.wait_job(daemon.ask("resume"))["outcome"] == "done"


def test_a_flush_does_not_outlive_its_engine(daemon: StandInDaemon) -> None:
    asked = daemon.ask("cache/flush")
    assert daemon.wait_heard(engine(daemon), "FlushCache")
    os.kill(daemon.worker("engine-0")["pid"], signal.SIGKILL)
    ended = daemon.wait_job(asked)
    assert (ended["outcome"], ended["message"]) == ("done", "the engine ended meanwhile, and its prompt cache with it")
    wait_for(lambda: daemon.status()["ready"], 30, "the next engine")


def test_there_is_no_cache_while_no_engine_is_ready(tmp_path: Path) -> None:
    with StandInDaemon(tmp_path, "--use_dynamic_prompt_cache") as daemon:
        daemon.order("engine", load_seconds=30)
        os.kill(daemon.worker("engine-0")["pid"], signal.SIGKILL)
        wait_for(lambda: not daemon.status()["ready"], 30, "the engine's death")
        assert daemon.status()["cache"] is None
        with daemon.control_client() as client:
            answer = client.get("/v1/cache")
        for refusal in (answer, daemon.ask("cache/flush")):
            assert (refusal.status_code, refusal.json()["error"]) == (503, "TryAgain")
