"""Reloads through the whole process tree, under clients that check every byte; the fake engine."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from closed_loop import CLIENTS, WAYS, ClosedLoop, Expected, Operator, Question, Timeline, ctl, jobs_of, kill_candidate
from config_file import config_in_force, daemon_of_a_file, value_of
from harness import Daemon, free_port, wait_for
from long_run import LONG

SEED = int(os.environ.get("LIGHTLLMD_SEED", "20261124"))
# The last two are still under way when most reloads end.
QUESTIONS = [Question(f"question {i}", WAYS[i % 4], 10 + 3 * i) for i in range(8)]
QUESTIONS += [Question(f"long question {i}", WAYS[i], 150) for i in range(2)]
BASE: dict[str, Any] = {
    "engine.backend": "fake",
    "engine.fake.tokens_per_second": 150,
    "engine.fake.load_seconds": 0.1,
    "http.workers": 2,
    "supervisor.load_timeout": 3,
    "supervisor.abort_grace": 0.2,
}


@dataclass(frozen=True)
class Step:
    """One edit of the file and what `lightllmctl reload` says to it."""

    what: str
    changes: dict[str, Any] = field(default_factory=dict)
    code: int = 0
    text: str | None = None  # of the whole file, in place of settings
    said: str = ""  # part of what lightllmctl prints


GOOD = [
    Step("live", {"supervisor.drain_timeout": 33, "log_stats_interval": 5}),
    Step("nothing", said="nothing changed"),
    Step("front end", {"http.hold_keepalive": 2}),
    Step("fewer front ends", {"http.workers": 1}),
    Step("more front ends", {"http.workers": 2, "http.max_body_bytes": 1 << 20}),
    Step("engine, beside", {"running_max_req_size": 500}),
    Step("live: how", {"supervisor.swap": "after"}),
    Step("engine, after", {"router_max_wait_tokens": 5}),
    Step("all classes, after", {"running_max_req_size": 600, "http.hold_keepalive": 3, "log.level": "warning"}),
    Step("live: how again", {"supervisor.swap": "auto"}),
    Step("all classes", {"max_total_token_num": 9000, "http.cors_origins": ["https://a.example"], "log.level": "info"}),
]
BAD = [
    Step("syntax", text="port = \n", code=6, said=":1:"),
    Step("unknown key", {"http.wrokers": 3}, 6, said="http.workers"),
    Step("out of bounds", {"http.workers": 0, "running_max_req_size": 0}, 6, said="running_max_req_size"),
    Step("a contradiction", {"max_req_input_len": 5000}, 6, said="max_req_total_len"),
    Step("no keys file", {"http.api_keys_file": "/nonexistent/keys"}, 6, said="/nonexistent/keys"),
    Step("an engine that crashes", {"engine.fake.fault": "crash_in_load"}, 9, said="SIGSEGV"),
    Step("an engine that hangs", {"engine.fake.fault": "hang_in_load"}, 9, said="hung"),
    Step("all classes, and a crash", {"engine.fake.fault": "exit_at_boot", "http.hold_keepalive": 4}, 9, said="exit 1"),
    Step("another machine's address", {"host": "192.0.2.1"}, 1, said="192.0.2.1"),
]


def steps(draw: random.Random) -> list[Step]:
    """The good ones in their order, the bad ones among them."""
    good, bad = GOOD, BAD
    if not LONG:
        good, bad = [*GOOD[:3], GOOD[5], GOOD[6], GOOD[8]], [*draw.sample(BAD[:5], 2), BAD[5], BAD[7]]
    places = sorted(draw.choices(range(len(good) + 1), k=len(bad)), reverse=True)
    mixed = list(good)
    for place, step in zip(places, draw.sample(bad, len(bad)), strict=True):
        mixed.insert(place, step)
    return mixed


@pytest.mark.timeout(900)
def test_reloads_of_every_class_good_and_bad_fail_no_request(tmp_path: Path) -> None:
    daemon, settings = daemon_of_a_file(tmp_path, BASE)
    with daemon.start():
        expected = Expected(QUESTIONS)
        expected.learn("the model", daemon.url)
        operator = Operator(daemon, timeline := Timeline("the model"))
        with ClosedLoop([daemon.url], QUESTIONS, CLIENTS) as load:
            load.wait_for(2 * CLIENTS)
            for step in steps(random.Random(SEED)):
                wanted = settings.write(step.changes)
                if step.text is not None:
                    settings.file.write_text(step.text)
                if LONG or len(step.changes) > 1:
                    before = config_in_force(daemon)
                    dry = operator.reload("--dry-run", code=6 if step.code == 6 else 0)
                    assert step.code == 6 or all(key in dry.output for key in step.changes), f"{step.what}: {dry}"
                    assert config_in_force(daemon) == before
                done = operator.reload(code=step.code)
                assert step.said in done.output + done.errors, f"{step.what}: {done}"
                if step.code == 0:
                    settings.in_force = wanted
                now = config_in_force(daemon)
                assert {key: value_of(now, key) for key in settings.in_force} == settings.in_force, step.what
                daemon.wait_ready()
                load.wait_for(CLIENTS)
        assert load.faults(expected, timeline) == []
        assert daemon.status()["requests"]["failed"] == 0
        wait_for(lambda: len(daemon.children()) == 3, what="two front ends and one engine alone")
        assert daemon.stop() == 0


def test_a_new_port_opens_before_the_old_one_closes(tmp_path: Path) -> None:
    """Clients that know both ports find one open at any time; connections to the old one finish."""
    daemon, settings = daemon_of_a_file(tmp_path, BASE)
    with daemon.start():
        expected = Expected(QUESTIONS)
        expected.learn("the model", daemon.url)
        operator = Operator(daemon, timeline := Timeline("the model"))
        ports = [daemon.port, free_port()]
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        with ClosedLoop(urls, QUESTIONS, CLIENTS) as load:
            load.wait_for(CLIENTS)
            for port in (ports[1], ports[0]) if LONG else ports[1:]:
                settings.write({"port": port})
                operator.reload()
                assert daemon.status()["listeners"] == [f"http://127.0.0.1:{port}"]
                load.wait_for(CLIENTS)
                fresh = httpx.post(f"http://127.0.0.1:{port}/generate", json={"inputs": "x"}, timeout=30)
                assert fresh.status_code == 200
                gone = ports[0] if port == ports[1] else ports[1]
                with pytest.raises(httpx.ConnectError):
                    httpx.get(f"http://127.0.0.1:{gone}/health", timeout=60)
        assert load.faults(expected, timeline) == []


def test_a_signal_reloads_and_a_second_reload_meanwhile_is_refused(tmp_path: Path) -> None:
    daemon, settings = daemon_of_a_file(tmp_path, BASE | {"supervisor.load_timeout": 60})
    with daemon.start():
        settings.write({"engine.fake.fault": "hang_in_load"})
        daemon.process.send_signal(signal.SIGHUP)
        wait_for(lambda: any("Loading" in job["phase"] for job in daemon.status()["jobs"]), what="a reload under way")
        assert ctl(daemon, "reload").code == 7
        kill_candidate(daemon)
        wait_for(lambda: not daemon.status()["jobs"], what="the end of the reload")
        last = jobs_of(daemon)[-1]
        assert (last["verb"], last["outcome"]) == ("reload", "rolled-back")
        assert last["by_uid"] is None


def test_no_two_processes_of_a_front_end_share_an_epoch(tmp_path: Path) -> None:
    """A place that was closed and opened again goes on counting: an engine tells its clients apart by that."""
    daemon, settings = daemon_of_a_file(tmp_path, BASE)
    with daemon.start():
        seen: dict[tuple[str, int], set[int]] = {}
        for workers in (2, 1, 2):
            settings.in_force = settings.write({"http.workers": workers})
            assert ctl(daemon, "reload").code == 0
            for worker in daemon.workers("api"):
                seen.setdefault((worker["name"], worker["generation"]), set()).add(worker["pid"])
        assert {name for name, _ in seen} == {"api-0", "api-1"}
        assert all(len(pids) == 1 for pids in seen.values()), seen


def test_a_revoked_key_is_refused_by_every_worker_and_after_one_died(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("kept\nrevoked\n")
    keys.chmod(0o644)
    flags = ("--http.api_keys_file", str(keys), "--http.workers", "2")

    def answers(daemon: Daemon, key: str) -> set[int]:
        """Of as many connections as reach both workers."""
        asked = {"headers": {"Authorization": f"Bearer {key}"}, "timeout": 30}
        return {httpx.get(f"{daemon.url}/v1/models", **asked).status_code for _ in range(16)}

    def end_worker(daemon: Daemon, index: int) -> None:
        gone = daemon.workers("api")[index]["pid"]
        os.kill(gone, signal.SIGKILL)
        wait_for(
            lambda: all(one["state"] == "running" and one["pid"] != gone for one in daemon.workers("api")),
            what="both workers",
        )

    with Daemon(tmp_path / "daemon", *flags).start() as daemon:
        operator = Operator(daemon, Timeline("the model"))
        assert answers(daemon, "revoked") == {200}
        assert "every user of this host may read the keys" in daemon.log_text()
        keys.write_text("kept\n")
        end_worker(daemon, 0)
        wait_for(lambda: answers(daemon, "revoked") == {401}, what="the changed keys in force at both")
        end_worker(daemon, 1)
        assert (answers(daemon, "revoked"), answers(daemon, "kept")) == ({401}, {200})
        assert "nothing changed" in operator.reload().output
