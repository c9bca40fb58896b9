"""The status page looks as systemctl's does, in every state, and survives a daemon of another version."""

from __future__ import annotations

import io
import json
import os
from typing import Any

import pytest

from lightllmctl.render import ASCII, UNICODE, clean, status_page, table

PID = os.getpid()


def lines(status: dict[str, Any], now: float, glyphs: Any = UNICODE) -> list[str]:
    return status_page(status, now, glyphs).plain.split("\n")


def test_serving_daemon_has_the_documented_layout(status: dict[str, Any], now: float) -> None:
    assert lines(status, now) == [
        "● lightllmd - LightLLM serving daemon                                           generation 7",
        "     Loaded: /etc/lightllmd/lightllmd.toml (loaded 2 h ago; 0 pending changes)",
        "     Active: active (serving) since Sun 2026-11-22 08:09:12 UTC; 2 h 34 min ago",
        "     Health: ready; heartbeat 0.4 s ago",
        f"   Main PID: {PID} (lightllmd)   Restarts: 1",
        "     Listen: http://0.0.0.0:8000, /run/lightllmd/control.sock",
        "      Model: qwen3-8b  ready  cuda bfloat16  tp 2  16.4 GB weights  KV 61% of 412k tokens",
        "   Requests: 12 running, 3 waiting, 0 held   (since start: 18,204 ok, 2 cancelled, 0 failed, 5 resumed)",
        "    Workers: ├─ 901 api             ready         205 MB",
        "             ├─ 903 engine rank 0   ready        41.2 GB  restarts 1 "
        "(killed by SIGKILL, 3 min ago; back in 4.1 s)",
        "             └─ 904 engine rank 1   ready        41.1 GB",
        "Nov 22 10:43:12 engine-0: killed by SIGKILL; 5 streams held",
    ]


def test_loading_daemon_shows_how_far_it_is(status: dict[str, Any], new_worker: Any, now: float) -> None:
    status.update(state="starting", ready=False, health="loading weights", since=now - 12, heartbeat_age_s=None)
    status["model"].update(state="loading", progress=0.61, kv_slots_used=0)
    status["workers"] = [
        new_worker("api-0"),
        new_worker("engine-0", pid=7, phase="load", progress=12_400_000_000, progress_total=20_300_000_000),
    ]
    page = lines(status, now)
    assert page[2] == "     Active: activating (starting) since Sun 2026-11-22 10:43:00 UTC; 12 s ago"
    assert page[3] == "     Health: loading weights"
    assert page[6] == (
        "      Model: qwen3-8b  loading 61% (12.4 GB of 20.3 GB)  cuda bfloat16  tp 2  16.4 GB weights"
        "  KV 0% of 412k tokens"
    )
    assert page[9] == "             └─   7 engine rank 0   loading 61%   205 MB"


def test_daemon_without_a_plan_has_no_model(status: dict[str, Any], now: float) -> None:
    status.update(model=None, workers=[], state="starting")
    page = lines(status, now)
    assert page[6] == "      Model: not planned yet"
    assert not any("Workers" in line for line in page)


def test_degraded_daemon_shows_the_cross_and_the_next_try(status: dict[str, Any], new_worker: Any, now: float) -> None:
    status.update(state="degraded", ready=False, health="engine in back-off: exit 1")
    status["model"]["state"] = "down"
    exit_ = {"cause": "exit 1", "at": now - 1, "back_in_s": None, "stderr": ["boom"]}
    gone = {"pid": None, "state": "backoff", "phase": "", "memory_bytes": 0, "next_try_at": now + 3}
    status["workers"] = [new_worker("api-0"), new_worker("engine-0", **gone, restarts=2, last_exit=exit_)]
    page = lines(status, now)
    assert page[0].startswith("× lightllmd")
    assert page[2].startswith("     Active: degraded since")
    assert (
        page[9] == "             └─   - engine rank 0   backoff      next try in 3.0 s  restarts 2 (exit 1, 1.0 s ago)"
    )


def test_draining_daemon_shows_its_job(status: dict[str, Any], new_job: Any, now: float) -> None:
    status.update(state="draining", ready=False, health="draining")
    status["jobs"] = [new_job(verb="drain", target="", phase="draining (2 of 14 left)", progress=0.857)]
    page = lines(status, now)
    assert page[2].startswith("     Active: active (draining)")
    assert page[11] == "        Job: #31 drain  draining (2 of 14 left) 86%  38 s"


def test_swapping_daemon_shows_whom_it_waits_for_and_what_else_there_is(
    status: dict[str, Any], new_job: Any, now: float
) -> None:
    status.update(state="swapping")
    status["config"]["pending_changes"] = 1
    status["models"] = [{"name": "qwen3-8b", "served": True}, {"name": "large"}, {"name": "hu\x1bge"}]
    phase = "waiting for 3 requests on qwen3-8b"
    status["jobs"] = [new_job(verb="swap", target="large", phase=phase)]
    page = lines(status, now)
    assert page[1].endswith("(loaded 2 h ago; 1 pending change)")
    assert page[2].startswith("     Active: active (swapping)")
    assert page[7] == "     Models: large, hu\\x1bge (lightllmctl swap NAME)"
    assert page[12] == f"        Job: #31 swap large  {phase}  38 s"
    status["config"]["pending_fault"] = "/etc/a.toml:3: port: 70000 is out of bounds\nmore"
    assert lines(status, now)[1].endswith("the file is bad now: /etc/a.toml:3: port: 70000 is out of bounds)")


def test_the_certificate_has_a_line_with_its_end_and_what_is_wrong_with_its_files(
    status: dict[str, Any], now: float
) -> None:
    certificate = {"file": "/etc/tls.crt", "expires": now + 86400 * 40, "mutual": False, "fault": ""}
    status["certificate"] = certificate
    assert lines(status, now)[7] == "        TLS: /etc/tls.crt   (expires in 40 d)"
    status["certificate"] = certificate | {"mutual": True, "fault": "http.tls_key: is bad", "expires": now - 60}
    expired = "/etc/tls.crt, with clients' certificates   (expired 1 min ago)   not taken up: http.tls_key: is bad"
    assert lines(status, now)[7] == f"        TLS: {expired}"


def test_pushed_metrics_have_a_line_where_there_is_a_gateway(status: dict[str, Any], now: float) -> None:
    push = {"gateway": "gw:9091", "job": "lightllm", "grouping_key": {}, "pushes": 1, "failures": 0, "failing": False}
    status["push"] = push | {"pushed_at": None}
    assert lines(status, now)[8] == "    Metrics: not pushed yet to gw:9091, job lightllm"
    status["push"] |= {"pushed_at": now - 3.2, "pushes": 1200}
    assert lines(status, now)[8] == "    Metrics: pushed 3.2 s ago to gw:9091, job lightllm"
    status["push"] |= {"pushed_at": now - 125, "failures": 7, "failing": True}
    expected = "    Metrics: pushed 2 min 5 s ago to gw:9091, job lightllm   (7 of 1,200 pushes failed)"
    assert lines(status, now)[8] == expected


def test_the_prompt_cache_has_a_line_where_there_is_one(status: dict[str, Any], now: float) -> None:
    status["cache"] = {"tokens": 123_400, "lookup_tokens": 0, "hit_tokens": 0, "evicted_tokens": 0}
    assert lines(status, now)[7] == (
        "      Cache: 123k prompt tokens cached   (since the engine's start: none of 0 found, 0 evicted)"
    )
    status["cache"] |= {"lookup_tokens": 2_000_000, "hit_tokens": 1_500_000, "evicted_tokens": 99}
    assert lines(status, now)[7].endswith("(since the engine's start: 75% of 2.0M found, 99 evicted)")
    status["cache"] = None
    assert not any("Cache" in line for line in lines(status, now))


def test_each_of_several_engines_has_a_line(status: dict[str, Any], now: float) -> None:
    each = {"running": 3, "waiting": 1, "kv_slots_used": 500, "kv_slots_total": 1000}
    status["replicas"] = [
        {"name": "engine-0", "ready": True, "cache": {"lookup_tokens": 100, "hit_tokens": 40}, **each},
        {"name": "engine-1", "ready": False, "cache": None},
    ]
    page = status_page(status, now).plain
    assert "Engines: engine-0  serves  3 running, 1 waiting  KV 50% of 1,000 tokens  prompt cache 40% found" in page
    assert "engine-1  down  0 running, 0 waiting\n" in page


def test_several_api_workers_are_numbered(status: dict[str, Any], new_worker: Any, now: float) -> None:
    status["workers"] = [new_worker("api-0"), new_worker("api-1", pid=902)]
    page = lines(status, now)
    assert page[8:10] == [
        "    Workers: ├─ 901 api 0   ready         205 MB",
        "             └─ 902 api 1   ready         205 MB",
    ]


def test_a_spare_engine_is_a_row_like_the_others(status: dict[str, Any], new_worker: Any, now: float) -> None:
    kept = new_worker("spare-0", kind="spare", pid=1905, memory_bytes=480_000_000, generation=0)
    status["workers"] = [new_worker("api-0"), new_worker("api-1", pid=902), kept]
    page = lines(status, now)
    assert page[8:11] == [
        "    Workers: ├─  901 api 0   ready         205 MB",
        "             ├─  902 api 1   ready         205 MB",
        "             └─ 1905 spare   ready         480 MB",
    ]


def test_ascii_terminals_get_ascii(status: dict[str, Any], now: float) -> None:
    assert status_page(status, now, ASCII).plain.isascii()


@pytest.mark.parametrize(
    "missing", ["config", "model", "models", "requests", "workers", "jobs", "events", "state", "since"]
)
def test_a_field_that_is_not_sent_is_left_out(status: dict[str, Any], now: float, missing: str) -> None:
    status.pop(missing, None)
    assert lines(status, now)[0].startswith("●")


def test_an_empty_status_still_makes_a_page(now: float) -> None:
    assert "Main PID: ?" in status_page({}, now).plain


def test_unknown_fields_and_states_are_no_trouble(status: dict[str, Any], new_worker: Any, now: float) -> None:
    status.update(state="hibernating", moon={"phase": 1})
    status["workers"] = [new_worker("visual-0", kind="visual", rank=None, state="dreaming", colour="blue")]
    page = lines(status, now)
    assert page[2].startswith("     Active: unknown (hibernating)")
    assert "visual   dreaming" in page[8]


def test_control_characters_of_workers_never_reach_the_terminal(status: dict[str, Any], now: float) -> None:
    status["events"][0]["message"] = "\x1b[2Jgone\r\n\x07"
    status["workers"][1]["last_exit"]["cause"] = "\x1b]0;title\x07"
    text = status_page(status, now).plain
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\\x1b[2Jgone\\x0d\\x0a\\x07" in text
    assert clean("tab\tstays, é too") == "tab\tstays, é too"


def test_status_prints_the_page_plainly_when_piped(ctl: Any, daemon: Any) -> None:
    result = ctl("status")
    assert result.code == 0
    assert result.err == ""
    assert "\x1b" not in result.out
    assert "qwen3-8b  ready" in result.out
    assert max(map(len, result.out.splitlines())) > 100  # nothing is wrapped to 80 columns


def test_json_is_the_daemons_answer_untouched(ctl: Any, daemon: Any, status: dict[str, Any]) -> None:
    status["something_new"] = [1]
    result = ctl("status", "--json")
    assert json.loads(result.out) == status
    assert json.loads(result.out)["api"] == 1


@pytest.mark.parametrize(("no_color", "colours"), [(None, True), ("1", False)])
def test_colours_are_systemctls_and_no_color_is_honoured(
    status: dict[str, Any], now: float, monkeypatch: pytest.MonkeyPatch, no_color: str | None, colours: bool
) -> None:
    from rich.console import Console

    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    else:
        monkeypatch.delenv("NO_COLOR", raising=False)
    out = io.StringIO()
    Console(file=out, force_terminal=True, highlight=False, soft_wrap=True).print(status_page(status, now))
    assert ("\x1b[32m●" in out.getvalue()) is colours
    status["state"] = "degraded"
    Console(file=out, force_terminal=True, highlight=False, soft_wrap=True).print(status_page(status, now))
    assert ("\x1b[31m×" in out.getvalue()) is colours


def test_tables_are_never_cut() -> None:
    page = table(("NAME", "N", "WHY"), [("a", "1", "x" * 300), ("bbbbbb", "12345", "")], right=(1,)).plain
    assert page.split("\n") == ["NAME        N  WHY", f"a           1  {'x' * 300}", "bbbbbb  12345"]
