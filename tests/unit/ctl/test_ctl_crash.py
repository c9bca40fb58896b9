"""lightllmctl crash: the list, one report, the last one."""

from __future__ import annotations

import json
from typing import Any

import pytest


@pytest.fixture
def report(now: float) -> dict[str, Any]:
    return {
        "id": 3,
        "at": now - 60,
        "worker": "engine-0",
        "pid": 903,
        "generation": 7,
        "revision": 2,
        "phase": "ready",
        "cause": "killed by SIGSEGV",
        "signal": "SIGSEGV",
        "exit_code": None,
        "self_inflicted": True,
        "version": "0.1.0",
        "model": "smollm2",
        "config_digest": "0123456789abcdef",
        "uptime_s": 7384.2,
        "progress": 99,
        "memory_bytes": 1_230_000_000,
        "stats": {"memory_used": 41.2e9, "running": 12, "waiting": 0},
        "last_step": {
            "number": 42,
            "kind": "prefill",
            "rows": 2,
            "tokens": 300,
            "unproven": [7, 9],
            "unproven_total": 5,
        },
        "xids": None,
        "stderr": ["Fatal Python error: Segmentation fault", "", "\x1b[31mThread 0x1"],
    }


def test_the_list_is_the_daemons(ctl: Any, daemon: Any, report: dict[str, Any]) -> None:
    daemon.get("/v1/crashes", [])
    assert ctl("crash").out == "No crashes.\n"
    daemon.get("/v1/crashes", [report, {**report, "id": 2, "worker": "api-0", "cause": "no\nway"}])
    assert ctl("crash").out.splitlines() == [
        "CRASH  WHEN             WORKER    PID  GENERATION  PHASE  CAUSE",
        "#3     Nov 22 10:42:12  engine-0  903           7  ready  killed by SIGSEGV",
        "#2     Nov 22 10:42:12  api-0     903           7  ready  no\\x0away",
    ]
    answer = json.loads(ctl("crash", "--json").out)
    assert (answer["api"], [crash["id"] for crash in answer["crashes"]]) == (1, [3, 2])


def test_one_report_is_a_page_with_the_last_output(ctl: Any, daemon: Any, report: dict[str, Any]) -> None:
    daemon.get("/v1/crashes/3", report)
    assert ctl("crash", "3").out.splitlines() == [
        "Crash #3: engine-0",
        "     Cause: killed by SIGSEGV",
        "      When: Sun 2026-11-22 10:42:12 UTC, 2 h 3 min after its start",
        "   Process: pid 903, generation 7, phase ready",
        " Last step: step 42: prefill, 2 rows, 300 tokens",
        "  Suspects: requests 7, 9 and 3 more",
        "    Memory: 1.23 GB resident, used 41.2 GB",
        "      Load: 12 running",
        "     Model: smollm2, revision 2, configuration 0123456789abcdef",
        "   Version: 0.1.0",
        "    Output:",
        "  Fatal Python error: Segmentation fault",
        "  ",
        "  \\x1b[31mThread 0x1",
    ]
    assert json.loads(ctl("crash", "#3", "--json").out)["stderr"] == report["stderr"]


def test_what_a_daemon_does_not_say_is_left_out(ctl: Any, daemon: Any) -> None:
    daemon.get("/v1/crashes/3", {"id": 3, "worker": "api-0", "cause": "out of memory", "exit_code": 80, "signal": None})
    out = ctl("crash", "3").out
    assert "Cause: out of memory (exit 80)" in out
    assert "Output: none" in out


def test_xids_are_shown_where_somebody_watched(ctl: Any, daemon: Any, report: dict[str, Any]) -> None:
    daemon.get("/v1/crashes/3", {**report, "xids": [31, 43]})
    assert "Xid: 31, 43\n" in ctl("crash", "3").out
    daemon.get("/v1/crashes/3", {**report, "xids": []})
    assert "Xid: none\n" in ctl("crash", "3").out


def test_last_is_the_newest(ctl: Any, daemon: Any, report: dict[str, Any]) -> None:
    daemon.get("/v1/crashes", [report])
    daemon.get("/v1/crashes/3", report)
    assert ctl("crash", "last").out.startswith("Crash #3: engine-0")


def test_exit_codes(ctl: Any, daemon: Any, answer: Any) -> None:
    daemon.get("/v1/crashes", [])
    assert ctl("crash", "last").code == 4
    daemon.get("/v1/crashes/9", answer({"error": "NoSuchCrash", "message": "no crash report 9", "id": 9}, 404))
    missing = ctl("crash", "9")
    assert (missing.code, missing.err) == (4, "lightllmctl: no crash report 9\n")
    for bad in ("first", "1/../status", "²", "-1"):
        assert ctl("crash", bad).code == 2
