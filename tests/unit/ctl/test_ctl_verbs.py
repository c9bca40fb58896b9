"""What each verb sends, waits for and prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lightllmd import __version__


def test_list_workers_names_what_can_be_restarted(ctl: Any, daemon: Any, status: dict[str, Any]) -> None:
    assert ctl("list-workers").out.splitlines() == [
        "NAME      KIND    RANK  PID  STATE  RESTARTS  GENERATION   MEMORY",
        "api-0     api        -  901  ready         0           7   205 MB",
        "engine-0  engine     0  903  ready         1           7  41.2 GB",
        "engine-1  engine     1  904  ready         0           7  41.1 GB",
    ]


def test_list_workers_json_has_the_documented_keys(ctl: Any, daemon: Any) -> None:
    answer = json.loads(ctl("list-workers", "--json").out)
    assert answer["api"] == 1
    assert len(answer["workers"]) == 3
    for worker in answer["workers"]:
        assert {"name", "kind", "rank", "pid", "state", "restarts", "generation"} <= worker.keys()


def test_list_jobs(ctl: Any, daemon: Any, new_job: Any, now: float) -> None:
    assert ctl("list-jobs").out == "No jobs.\n"
    daemon.get("/v1/jobs", [new_job(), new_job(32, verb="drain", target="", outcome="failed", message="no\nway",
                                               started=now, ended=now + 61)])  # fmt: skip
    out = ctl("list-jobs").out.splitlines()
    assert out[0].split() == ["JOB", "VERB", "TARGET", "STATE", "STARTED", "TOOK", "MESSAGE"]
    assert out[1].startswith("#31  restart  engine  loading  Nov 22 10:42:34")
    assert out[2].startswith("#32  drain    -       failed   Nov 22 10:43:12")
    assert out[2].endswith("1 min 1 s  no\\x0away")
    assert json.loads(ctl("list-jobs", "--json").out)["jobs"][0]["id"] == 31


@pytest.mark.parametrize(
    ("arguments", "path", "body"),
    [
        (["restart"], "/v1/restart", {}),
        (["restart", "api-0"], "/v1/restart", {"worker": "api-0"}),
        (["drain"], "/v1/drain", {}),
        (["resume"], "/v1/resume", {}),
    ],
)
def test_a_job_is_followed_to_its_end(
    ctl: Any, daemon: Any, answer: Any, new_job: Any, arguments: list[str], path: str, body: dict[str, Any]
) -> None:
    daemon.post(path, answer(new_job(phase="queued"), 202))
    steps = [
        new_job(phase="stopping"),
        "",
        new_job(phase="loading", progress=0.5),
        new_job(phase="loading", progress=1),
    ]
    daemon.get("/v1/jobs/31", answer(lines=[*steps, new_job(phase="done", outcome="done", message="back in 4.1 s")]))
    result = ctl(*arguments)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [
        "job #31 restart engine: queued",
        "job #31 restart engine: stopping",
        "job #31 restart engine: loading",
        "job #31 restart engine done: back in 4.1 s",
    ]
    assert daemon.seen[0] == ("POST", path, {}, body)


def test_a_job_that_ended_at_once_is_told_once(ctl: Any, daemon: Any, answer: Any, new_job: Any) -> None:
    done = new_job(verb="resume", target="", phase="done", outcome="done", message="new requests are accepted")
    daemon.post("/v1/resume", answer(done, 202))
    daemon.get("/v1/jobs/31", answer(lines=[done]))
    assert ctl("resume").out == "job #31 resume done: new requests are accepted\n"


def test_no_block_only_starts_the_job(ctl: Any, daemon: Any, answer: Any, new_job: Any) -> None:
    daemon.post("/v1/restart", answer(new_job(), 202))
    result = ctl("restart", "--no-block")
    assert (result.code, result.out) == (0, "job #31 restart engine started\n")
    assert len(daemon.seen) == 1


@pytest.mark.parametrize(
    ("outcome", "code", "words"),
    [
        ("failed", 1, "job #31 restart engine failed: exit 78"),
        ("cancelled", 1, "job #31 restart engine cancelled: exit 78"),
        ("rolled-back", 9, "job #31 restart engine was rolled back: exit 78"),
        (None, 1, "the daemon ended before job #31 restart engine did"),
    ],
)
def test_a_bad_end_is_the_exit_code(
    ctl: Any, daemon: Any, answer: Any, new_job: Any, outcome: str | None, code: int, words: str
) -> None:
    daemon.post("/v1/restart", new_job())
    daemon.get("/v1/jobs/31", answer(lines=[new_job(outcome=outcome, message="exit 78")]))
    result = ctl("restart")
    assert (result.code, result.err) == (code, f"lightllmctl: {words}\n")


def test_1_when_the_daemon_dies_during_the_job(ctl: Any, daemon: Any, answer: Any, new_job: Any) -> None:
    daemon.post("/v1/restart", new_job())
    daemon.get("/v1/jobs/31", answer(lines=[new_job()], cut=True))
    result = ctl("restart")
    assert result.code == 1
    assert result.err.startswith("lightllmctl: the daemon closed the connection")


def test_10_when_the_job_takes_longer_than_asked(ctl: Any, daemon: Any, answer: Any, new_job: Any) -> None:
    release = threading.Event()
    daemon.post("/v1/drain", new_job(verb="drain", target=""))
    daemon.get("/v1/jobs/31", answer(lines=[new_job(), lambda: release.wait(120) and ""]))
    result = ctl("drain", "--timeout", "300ms")
    release.set()
    assert result.code == 10
    assert result.err == "lightllmctl: job #31 restart engine was not finished within 0.3 s and goes on\n"


def test_stop_returns_when_the_daemon_is_gone(
    ctl: Any, daemon: Any, answer: Any, new_job: Any, status: dict[str, Any]
) -> None:
    """The stub's process is this one, so that the pid is hidden: the socket's end is what counts then."""
    status["pid"] = 0

    def last_breath() -> dict[str, Any]:
        threading.Thread(target=daemon.end).start()
        return new_job(phase="stopping")

    daemon.post("/v1/stop", new_job(verb="stop", target=""))
    daemon.get("/v1/jobs/31", answer(lines=[last_breath], cut=True))
    result = ctl("stop", "--now")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == "lightllmd has stopped"
    assert ("POST", "/v1/stop", {}, {"now": True}) in daemon.seen


def test_stop_waits_for_the_process_where_it_sees_it(
    ctl: Any, daemon: Any, answer: Any, new_job: Any, status: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightllmctl.client import Client

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        status["pid"] = process.pid
        monkeypatch.setattr(Client, "daemon_pid", lambda self: process.pid)
        daemon.post("/v1/stop", new_job())
        daemon.get("/v1/jobs/31", answer(lines=[new_job()]))
        assert ctl("stop", "--timeout", "0.2").code == 10
        assert process.stdin
        process.stdin.close()
        assert ctl("stop").code == 0
        assert process.poll() is not None or process.wait(60) is not None


def test_10_when_the_daemon_does_not_stop_in_time(
    ctl: Any, daemon: Any, answer: Any, new_job: Any, status: dict[str, Any]
) -> None:
    status["pid"] = 0
    daemon.post("/v1/stop", new_job())
    daemon.get("/v1/jobs/31", answer(lines=[new_job()]))
    result = ctl("stop", "--timeout", "0.3")
    assert result.code == 10
    assert "goes on" in result.err


def test_a_peers_pid_is_the_listeners(daemon: Any) -> None:
    from lightllmctl.client import Client

    assert Client(daemon.path).daemon_pid() == os.getpid()


CACHE = {
    "tokens": 12_345, "evictable": 12_000, "kv_slots_total": 412_000,
    "lookup_tokens": 1_234_567, "hit_tokens": 987_654, "evicted_tokens": 7,
}  # fmt: skip


def test_cache_stats_are_a_table(ctl: Any, daemon: Any) -> None:
    daemon.get("/v1/cache", CACHE)
    assert ctl("cache", "stats").out.splitlines() == [
        "TOKENS          COUNT  SHARE",
        "cached         12,345  3% of the KV cache",
        "unused now     12,000  97% of what is cached",
        "looked up   1,234,567  -",
        "found         987,654  80% of what was looked up",
        "evicted             7  -",
    ]
    assert json.loads(ctl("cache", "stats", "--json").out) == {"api": 1, **CACHE}
    daemon.get("/v1/cache", dict.fromkeys(CACHE, 0))
    assert "found           0  -" in ctl("cache", "stats").out.splitlines()


def test_cache_flush_is_a_job(ctl: Any, daemon: Any, answer: Any, new_job: Any) -> None:
    flush = new_job(verb="flush-cache", target="")
    daemon.post("/v1/cache/flush", answer(flush, 202))
    daemon.get("/v1/jobs/31", answer(lines=[{**flush, "outcome": "done", "message": "70 tokens forgotten"}]))
    result = ctl("cache", "flush")
    assert (result.code, result.out.splitlines()[-1]) == (0, "job #31 flush-cache done: 70 tokens forgotten")


@pytest.mark.parametrize("verb", ["stats", "flush"])
def test_1_without_a_prompt_cache(ctl: Any, daemon: Any, answer: Any, verb: str) -> None:
    off = answer({"error": "PromptCacheOff", "message": "use_dynamic_prompt_cache = false"}, 409)
    daemon.get("/v1/cache", off)
    daemon.post("/v1/cache/flush", off)
    result = ctl("cache", verb)
    assert (result.code, result.out, result.err) == (1, "", "lightllmctl: use_dynamic_prompt_cache = false\n")


def test_cache_alone_or_misspelt_says_what_there_is(ctl: Any) -> None:
    result = ctl("cache")
    assert (result.code, result.out) == (2, "")
    assert "flush" in result.err
    assert "stats" in result.err
    result = ctl("cache", "flsh")
    assert (result.code, result.err) == (2, "lightllmctl: no such verb: flsh, did you mean flush?\n")


def test_logs_and_events_pass_their_options_on(ctl: Any, daemon: Any, answer: Any, now: float) -> None:
    entry = {"at": now, "worker": "engine-0", "level": "error", "message": "\x1b[31mred [bold]x[/bold]"}
    daemon.get("/v1/logs", answer(lines=["", entry, "", {**entry, "new": 1}]))
    result = ctl("logs", "-n", "7", "engine-0")
    assert result.out.splitlines() == ["Nov 22 10:43:12 engine-0: \\x1b[31mred [bold]x[/bold]"] * 2
    assert daemon.seen[-1] == ("GET", "/v1/logs", {"follow": "0", "lines": "7", "worker": "engine-0"}, None)
    assert json.loads(ctl("logs", "--json").out.splitlines()[0]) == entry

    event = {"seq": 1, "at": now, "kind": "job", "worker": None, "message": "drained"}
    daemon.get("/v1/events", answer(lines=[event]))
    assert ctl("events", "-f").out == "Nov 22 10:43:12 drained\n"
    assert daemon.seen[-1] == ("GET", "/v1/events", {"follow": "1", "lines": "50"}, None)


def test_lines_come_out_as_they_happen(daemon: Any, answer: Any, now: float) -> None:
    """`logs -f` into a pipe: the first line is there while the stream is still open."""
    release = threading.Event()
    entry = {"at": now, "worker": "api-0", "level": "info", "message": "hello"}
    daemon.get("/v1/logs", answer(lines=[entry, lambda: release.wait(120) and entry]))
    command = [sys.executable, "-m", "lightllmctl", "--socket", str(daemon.path), "logs", "-f"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline().endswith("api-0: hello\n")
        assert process.poll() is None
        release.set()
        assert process.wait(120) == 0


def test_check_prints_one_problem_per_line(ctl: Any, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('port = "eighty"\n[engine]\nbackend = "fake"\n[http]\nworkerz = 2\n')
    result = ctl("check", str(file))
    assert result.code == 6
    assert result.out == ""
    problems = result.err.splitlines()
    assert len(problems) == 2
    assert problems[0].startswith(f"{file}:1: port: ")
    assert problems[1].startswith(f"{file}:5: http.workerz: ")
    answer = json.loads(ctl("check", "--json", str(file)).out)
    assert answer["ok"] is False
    assert [problem["line"] for problem in answer["problems"]] == [1, 5]


def test_check_of_a_good_file(ctl: Any, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('port = 8001\n[engine]\nbackend = "fake"\n')
    result = ctl("check", str(file))
    assert (result.code, result.out, result.err) == (0, f"{file}: no problems found\n", "")


def test_check_of_a_file_that_cannot_be_read(ctl: Any, tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        result = ctl("check", str(path))
        assert result.code == 6
        assert len(result.err.splitlines()) == 1


CONFIG = {
    "params": {"host": "127.0.0.1", "port": 8000, "model_dir": None, "eos_id": [2], "splitfuse_mode": False},
    "supervisor": {"drain_timeout": 60.0, "control_socket": "a \"quoted\" é"},
    "engine": {"backend": "fake", "fake": {"poison": "", "load_bytes": 0}},
    "models": {},
    "places": {"port": 3},
}  # fmt: skip


def test_config_is_the_toml_that_would_say_the_same(ctl: Any, daemon: Any) -> None:
    import tomllib

    daemon.get("/v1/config", CONFIG)
    read = tomllib.loads(ctl("config").out)
    assert read == {
        "host": "127.0.0.1", "port": 8000, "eos_id": [2], "splitfuse_mode": False,
        "supervisor": CONFIG["supervisor"], "engine": CONFIG["engine"],
    }  # fmt: skip
    assert "# model_dir is not set" in ctl("config").out
    assert json.loads(ctl("config", "--json").out) == {"api": 1, **CONFIG}


def test_config_quotes_the_names_of_models_where_toml_needs_it(ctl: Any, daemon: Any) -> None:
    import tomllib

    models = {"small": {"model_dir": "/m/small"}, "large-1.5": {"model_dir": "/m/large", "eos_id": [2]}}
    daemon.get("/v1/config", {**CONFIG, "models": models})
    assert tomllib.loads(ctl("config").out)["models"] == models


def test_effective_configuration_has_reasons_and_the_memory_budget(ctl: Any, daemon: Any) -> None:
    effective: dict[str, Any] = {
        "config": CONFIG,
        "values": {"max_total_token_num": 6000, "eos_id": [2], "vocab_size": 257},
        "derived": [
            {"name": "max_total_token_num", "value": 6000, "reason": "nothing could be measured"},
            {"name": "threads", "value": 2, "reason": "physical cores"},
        ],
        "budget": {
            "rows": [
                {"name": "weights", "bytes": 270_000_000, "how": "134 M in bfloat16"},
                {"name": "kv cache", "bytes": 138_240_000, "how": "6,000 slots"},
            ],
            "available": 4_000_000_000,
        },
        "budget_needed": 408_240_000,
        "report": "",
    }
    daemon.get("/v1/config", effective)
    result = ctl("config", "--effective")
    assert daemon.seen[-1][2] == {"effective": "1"}
    assert result.out.splitlines() == [
        "SETTING              VALUE  REASON",
        "max_total_token_num  6000   nothing could be measured",
        "eos_id               [2]    as configured",
        "vocab_size           257",
        "threads              2      physical cores",
        "",
        "MEMORY     BYTES  HOW",
        "weights   270 MB  134 M in bfloat16",
        "kv cache  138 MB  6,000 slots",
        "total     408 MB  of 4.00 GB; fits",
    ]
    places = [
        {
            "replica": 0,
            "rank": rank,
            "device": f"GPU {rank} (H200)",
            "free": 10**10,
            "needed": 10**9,
            "available": 9 * 10**9,
        }
        for rank in range(2)
    ]
    daemon.get("/v1/config", {**effective, "devices": places})
    assert ctl("config", "--effective").out.splitlines()[-3:] == [
        "DEVICE        REPLICA  RANK     FREE  PLANNED",
        "GPU 0 (H200)        0     0  10.0 GB  1.00 GB of 9.00 GB",
        "GPU 1 (H200)        0     1  10.0 GB  1.00 GB of 9.00 GB",
    ]
    daemon.get("/v1/config", effective)
    effective["measured"] = {"memory_loaded": 300_000_000, "memory_used": 400_000_000}
    assert ctl("config", "--effective").out.splitlines()[-1] == "measured: loaded 300 MB, used 400 MB"
    del effective["measured"]
    effective["budget"]["available"] = 400_000_000
    assert ctl("config", "--effective").out.splitlines()[-1] == "total     408 MB  of 400 MB; 8.24 MB too much"


def test_version_tells_both(ctl: Any, daemon: Any) -> None:
    daemon.get("/v1/version", {"api": 1, "version": "9.9", "python": "3.11", "pid": 5})
    assert ctl("version").out == f"lightllmctl {__version__}\nlightllmd 9.9 (Python 3.11, pid 5)\n"
    daemon.end()
    result = ctl("version")
    assert (result.code, result.out) == (0, f"lightllmctl {__version__}\nlightllmd is not running\n")
    assert json.loads(ctl("version", "--json").out) == {"api": 1, "lightllmctl": __version__, "daemon": None}
    assert ctl("--version").out == f"lightllmctl, version {__version__}\n"
