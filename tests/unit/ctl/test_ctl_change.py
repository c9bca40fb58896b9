"""reload and swap: what they send, what they print, and that each cause has its own exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

MODELS = [
    {"name": "small", "model_dir": "/m/small", "served": True},
    {"name": "large", "model_dir": "/m/large", "served": False},
]
DETAILS = {"how": "beside", "phases": [["plan", 0.25], ["start", 1.5]], "plan": "model: large\nmemory: all of it"}


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        (["large"], {}),
        (["large", "--plan"], {"plan": True}),
        (["large", "--drain", "1m30s", "--force"], {"drain_timeout": 90.0, "force": True}),
        (["large", "--drain", "5"], {"drain_timeout": 5.0}),
        (["large", "--on-failure", "keep"], {"on_failure": "keep"}),
        (["/m/other"], {"model": "/m/other"}),
    ],
)
def test_a_swap_sends_its_terms(
    ctl: Any, daemon: Any, answer: Any, new_job: Any, arguments: list[str], body: dict[str, Any]
) -> None:
    done = new_job(verb="swap", target="large", outcome="done", message="large is in force", details=DETAILS)
    daemon.get("/v1/models", MODELS)
    daemon.post("/v1/swap", answer(new_job(verb="swap"), 202))
    daemon.get("/v1/jobs/31", answer(lines=[done]))
    result = ctl("swap", *arguments)
    assert (result.code, result.err) == (0, "")
    assert "large is in force" in result.out
    assert ("memory: all of it" if "--plan" in arguments else "plan 0.25 s, start 1.50 s") in result.out
    sent = next(seen[3] for seen in daemon.seen if seen[0] == "POST")
    assert sent == {"model": "large", "plan": False, "force": False, "on_failure": "rollback", **body}


def test_a_path_is_the_callers_not_the_daemons(
    ctl: Any, daemon: Any, answer: Any, new_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("here", "small"):
        (tmp_path / name).mkdir()
    daemon.get("/v1/models", MODELS)
    daemon.post("/v1/swap", answer(new_job(), 202))
    assert ctl("swap", "here", "--no-block").code == 0
    assert ctl("swap", "small", "--no-block").code == 0
    posted = [seen[3]["model"] for seen in daemon.seen if seen[0] == "POST"]
    assert posted == [str(tmp_path / "here"), "small"], "a name of [models] comes first"


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        ("./absent", "{here}/absent"),
        ("absent/deep/", "{here}/absent/deep"),
        ("here", "{here}/here"),
        ("package:x/y", "package:x/y"),
        ("/m/../m/x", "/m/../m/x"),
        ("absent", "absent"),
    ],
)
def test_a_relative_path_is_sent_absolute(
    ctl: Any, daemon: Any, answer: Any, new_job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str,
    sent: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    daemon.get("/v1/models", MODELS)
    daemon.post("/v1/swap", answer(new_job(), 202))
    assert ctl("swap", typed, "--no-block").code == 0
    assert daemon.seen[-1][3]["model"] == sent.format(here=tmp_path)


def test_1_when_the_new_model_was_kept_and_does_not_serve(ctl: Any, daemon: Any, answer: Any, new_job: Any) -> None:
    details = {**DETAILS, "kept": "killed by SIGSEGV\x1b[2J"}
    daemon.post("/v1/swap", answer(new_job(verb="swap"), 202))
    daemon.get("/v1/jobs/31", answer(lines=[new_job(verb="swap", outcome="done", message="kept", details=details)]))
    result = ctl("swap", "large", "--on-failure", "keep")
    assert result.code == 1
    assert "does not serve yet, it is tried again: killed by SIGSEGV\\x1b[2J" in result.err


@pytest.mark.parametrize(
    ("typed", "seconds"),
    [("0", 0.0), ("90", 90.0), ("1.5", 1.5), ("1.5s", 1.5), ("250ms", 0.25), ("5m", 300.0), ("5 min", 300.0),
     ("1h30m", 5400.0), ("1d", 86400.0)],
)  # fmt: skip
def test_durations_are_taken_as_people_write_them(
    ctl: Any, daemon: Any, answer: Any, new_job: Any, typed: str, seconds: float
) -> None:
    daemon.post("/v1/swap", answer(new_job(), 202))
    assert ctl("swap", "large", "--no-block", "--drain", typed).code == 0
    assert daemon.seen[-1][3]["drain_timeout"] == seconds


@pytest.mark.parametrize("drain", ["soon", "", "1e3", "5x", "1m soon", "9" * 400, "-1", "5 parsecs", "nan", "inf"])
def test_2_for_what_is_no_duration(ctl: Any, daemon: Any, drain: str) -> None:
    result = ctl("swap", "large", "--drain", drain)
    assert result.code == 2
    assert "duration" in result.err


def test_2_for_force_without_a_deadline(ctl: Any, daemon: Any) -> None:
    assert ctl("swap", "large", "--force").code == 2


@pytest.mark.parametrize(
    ("outcome", "error", "code"),
    [
        ("rolled-back", {"error": "RolledBack", "message": "m", "cause": "out of memory"}, 9),
        ("failed", {"error": "DoesNotFit", "message": "m", "needed": 9, "free": 8}, 8),
        ("failed", {"error": "NoSuchModel", "message": "m", "model": "x", "candidates": []}, 4),
        ("failed", {"error": "OfANewerDaemon", "message": "m"}, 1),
    ],
)
def test_a_swap_that_fails_has_its_causes_exit_code(
    ctl: Any, daemon: Any, answer: Any, new_job: Any, outcome: str, error: dict[str, Any], code: int
) -> None:
    daemon.get("/v1/models", MODELS)
    daemon.post("/v1/swap", answer(new_job(verb="swap", target="large"), 202))
    ended = new_job(verb="swap", target="large", outcome=outcome, message="why it failed", error=error)
    daemon.get("/v1/jobs/31", answer(lines=[ended]))
    result = ctl("swap", "large")
    assert result.code == code
    assert "why it failed" in result.err


def test_a_dry_run_shows_each_change_with_its_class(ctl: Any, daemon: Any, answer: Any, new_job: Any) -> None:
    changes = [
        {"key": "port", "old": 8000, "new": 8080, "reload": "front end"},
        {"key": "data_type", "old": "auto", "new": "fp32", "reload": "engine"},
    ]
    done = new_job(verb="reload", target="dry run", outcome="done", message="2 changed", details={"changes": changes})
    daemon.post("/v1/reload", answer(new_job(verb="reload"), 202))
    daemon.get("/v1/jobs/31", answer(lines=[done]))
    out = ctl("reload", "--dry-run").out.splitlines()
    assert daemon.seen[0] == ("POST", "/v1/reload", {}, {"dry_run": True})
    assert [line.split() for line in out[-3:]] == [
        ["SETTING", "IN", "FORCE", "IN", "THE", "FILE", "CLASS"],
        ["port", "8000", "8080", "front", "end"],
        ["data_type", '"auto"', '"fp32"', "engine"],
    ]


def test_a_dry_run_that_takes_a_new_engine_shows_whether_it_fits(
    ctl: Any, daemon: Any, answer: Any, new_job: Any
) -> None:
    changes = [{"key": "models.a", "old": {"model_dir": "\x9bred"}, "new": None, "reload": "live"}]
    done = new_job(verb="reload", outcome="done", message="m", details={"changes": changes, "plan": "a\n  b\x1b"})
    daemon.post("/v1/reload", answer(new_job(verb="reload"), 202))
    daemon.get("/v1/jobs/31", answer(lines=[done]))
    out = ctl("reload", "--dry-run").out.splitlines()
    assert out[-4].split() == ["models.a", '{"model_dir":', '"\\u009bred"}', "-", "live"]
    assert out[-3:] == ["", "a", "  b\\x1b"]


def test_a_reload_without_a_change_is_a_success(ctl: Any, daemon: Any, answer: Any, new_job: Any) -> None:
    done = new_job(verb="reload", target="", outcome="done", message="nothing changed", details={"changes": []})
    daemon.post("/v1/reload", answer(done, 202))
    daemon.get("/v1/jobs/31", answer(lines=[done]))
    for arguments in ([], ["--dry-run"]):
        result = ctl("reload", *arguments)
        assert (result.code, result.out) == (0, "job #31 reload done: nothing changed\n")


def test_a_job_that_is_only_started_says_so_and_prints_nothing_else(
    ctl: Any, daemon: Any, answer: Any, new_job: Any
) -> None:
    daemon.post("/v1/reload", answer(new_job(verb="reload", target=""), 202))
    assert ctl("reload", "--no-block").out == "job #31 reload started\n"
    assert len(daemon.seen) == 1


def test_6_for_a_bad_file_each_problem_with_its_line(ctl: Any, daemon: Any, answer: Any, new_job: Any) -> None:
    problem = {"key": "port", "message": "70000 is out of bounds: 0 … 65535", "file": "/etc/l.toml", "line": 3}
    error = {"error": "ConfigInvalid", "message": "m", "problems": [problem]}
    daemon.post("/v1/reload", answer(new_job(verb="reload"), 202))
    daemon.get("/v1/jobs/31", answer(lines=[new_job(verb="reload", outcome="failed", message="m", error=error)]))
    result = ctl("reload")
    assert result.code == 6
    assert result.err == "/etc/l.toml:3: port: 70000 is out of bounds: 0 … 65535\n"


def test_list_models(ctl: Any, daemon: Any) -> None:
    daemon.get("/v1/models", MODELS)
    assert [line.split() for line in ctl("list-models").out.splitlines()] == [
        ["NAME", "SERVED", "MODEL_DIR"],
        ["small", "yes", "/m/small"],
        ["large", "-", "/m/large"],
    ]


def test_reset_failed(ctl: Any, daemon: Any, answer: Any, new_job: Any) -> None:
    daemon.post("/v1/reset-failed", answer(new_job(verb="reset-failed", target="engine-0"), 202))
    daemon.get("/v1/jobs/31", answer(lines=[new_job(verb="reset-failed", outcome="done", message="forgotten")]))
    assert ctl("reset-failed", "engine-0").code == 0
    assert daemon.seen[0] == ("POST", "/v1/reset-failed", {}, {"worker": "engine-0"})
