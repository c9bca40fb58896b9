"""Whatever the locale, the streams and the daemon's words: no traceback, no control character on the terminal."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import tomli

from lightllmctl.__main__ import cli, main
from lightllmd import console

NAME = "é…€😀\x1b]0;title\x07\x9b31m\u202e\ud800\nsecond"
VERBS = (
    ["status"],
    ["status", "--json"],
    ["is-active"],
    ["is-ready"],
    ["list-workers"],
    ["list-workers", "--json"],
    ["list-models"],
    ["list-models", "--json"],
    ["list-jobs"],
    ["list-jobs", "--json"],
    ["config"],
    ["config", "--json"],
    ["config", "--effective"],
    ["cache", "stats"],
    ["crash"],
    ["crash", "1"],
    ["crash", "1", "--json"],
    ["logs"],
    ["logs", "--json"],
    ["events"],
    ["version"],
    ["version", "--json"],
    ["restart", "engine"],
    ["reload", "--dry-run"],
    ["swap", "x", "--plan"],
    ["drain"],
    ["resume"],
    ["reset-failed"],
)


@pytest.fixture
def hostile(daemon: Any, answer: Any, status: dict[str, Any], new_job: Any, new_worker: Any, now: float) -> Any:
    """A daemon all of whose texts are NAME."""
    details = {"changes": [{"key": NAME, "old": NAME, "new": NAME, "reload": NAME}], "plan": NAME}
    job = new_job(verb=NAME, target=NAME, phase=NAME)
    done = new_job(verb=NAME, target=NAME, phase=NAME, outcome="done", message=NAME, details=details)
    line = {"at": now, "worker": NAME, "level": NAME, "message": NAME, "kind": NAME}
    worker = new_worker("api-0") | {"name": NAME, "kind": NAME, "rank": None, "state": NAME, "phase": NAME}
    status |= {"name": NAME, "state": NAME, "health": NAME, "listeners": [NAME], "control_socket": NAME}
    status["config"] = {"file": NAME, "loaded": now, "pending_fault": NAME}
    status["model"] |= {"name": NAME, "state": NAME, "device": NAME, "data_type": NAME}
    status |= {"models": [{"name": NAME}], "workers": [worker], "jobs": [job], "events": [line]}
    crash = {"id": 1, "at": now, "worker": NAME, "pid": NAME, "generation": NAME, "phase": NAME, "cause": NAME}
    report = crash | {"stderr": [NAME], "last_step": {"kind": NAME}, "model": NAME, "version": NAME, "xids": [NAME]}
    values = {"params": {"model_dir": NAME}, "models": {"é": {"x": NAME}}, "values": {NAME: NAME}}
    budget = {"rows": [{"name": NAME, "bytes": 1, "how": NAME}], "available": 1}
    status["requests"] = {}
    daemon.get("/v1/models", [{"name": NAME, "model_dir": NAME, "served": True}, {"name": "x" * 1_000_000}])
    daemon.get("/v1/config", values | {"budget": budget, "measured": {NAME: 1}})
    daemon.get("/v1/crashes", [crash])
    daemon.get("/v1/crashes/1", report)
    daemon.get("/v1/cache", {"tokens": 1, "kv_slots_total": 2})
    daemon.get("/v1/version", {"version": NAME, "python": NAME, "pid": NAME})
    for path in ("/v1/logs", "/v1/events"):
        daemon.get(path, answer(lines=[line]))
    for verb in ("restart", "reload", "swap", "drain", "resume", "reset-failed"):
        daemon.post(f"/v1/{verb}", job)
    daemon.get("/v1/jobs/31", answer(lines=[job, done]))
    return daemon


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, daemon: Any) -> Callable[..., tuple[int, str, str]]:
    """Runs lightllmctl with streams of an encoding: its exit code, stdout and stderr."""

    def run(encoding: str, *arguments: str) -> tuple[int, str, str]:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding, "strict") for _ in range(2))
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            code = main(["--socket", str(daemon.path), *arguments])
        return code, out.detach().getvalue().decode(encoding), err.detach().getvalue().decode(encoding)

    return run


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1", "utf-8"])
def test_every_verb_prints_whatever_the_daemon_says(hostile: Any, printed: Any, encoding: str) -> None:
    for verb in VERBS:
        code, out, err = printed(encoding, *verb)
        assert "internal error" not in err, (verb, err)
        assert code in (0, 3), (verb, code, err)  # 3: a state that is none
        assert re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]", out + err) == [], verb
        assert len(out) < 10_000 or "--json" in verb, verb
        if "--json" in verb:
            for line in [out] if verb[0] != "logs" else out.splitlines():
                assert NAME in json.loads(line.encode(encoding)).values() or NAME in walked(json.loads(line)), verb


def test_a_printed_configuration_is_toml_in_any_encoding(daemon: Any, printed: Any) -> None:
    name = NAME.replace("\ud800", "")
    daemon.get("/v1/config", {"params": {"model_dir": name, "tp": None}, "models": {"é.1": {"model_dir": "/m/中"}}})
    for encoding in ("ascii", "iso-8859-1", "utf-8"):
        _, out, _ = printed(encoding, "config")
        assert tomli.loads(out) == {"model_dir": name, "models": {"é.1": {"model_dir": "/m/中"}}}


def walked(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [found for one in value.values() for found in walked(one)]
    return [found for one in value for found in walked(one)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1"])
def test_refusals_are_printed_in_any_encoding(printed: Any, daemon: Any, answer: Any, encoding: str) -> None:
    problems = [{"key": NAME, "message": NAME, "file": NAME, "line": 3}]
    daemon.post("/v1/reload", answer({"error": "ConfigInvalid", "message": NAME, "problems": problems}, 400))
    daemon.post("/v1/drain", answer({"error": NAME, "message": NAME}, 409))
    for verb, code in ((["reload"], 6), (["drain"], 7), (["check", f"{NAME[:4]}.toml"], 6), ([NAME[:3]], 2)):
        found, out, err = printed(encoding, *verb)
        assert (found, out) == (code, ""), err
        assert re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", err) == []


def test_help_of_all_verbs_is_ascii() -> None:
    """click prints it by a way of its own, past the streams' error handler."""
    import click

    def helps(command: click.Command, parent: click.Context | None) -> str:
        context = click.Context(command, parent, info_name=command.name)
        inner = command.commands.values() if isinstance(command, click.Group) else ()
        return command.get_help(context) + "".join(helps(one, context) for one in inner)

    assert helps(cli, None).isascii()


def test_text_degrades_to_what_an_encoding_has() -> None:
    console.prepare()
    for encoding, expected in (
        ("ascii", "at least 1 ... 5, \\u00e9 \\u4e2d"),
        ("iso-8859-1", "at least 1 ... 5, é \\u4e2d"),
    ):
        text = "at least 1 … 5, é 中".encode(encoding, "lightllmd.console").decode(encoding)
        assert text == expected
    assert "\udcff.toml".encode("utf-8", "lightllmd.console") == b"\\xff.toml"


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1"])
@pytest.mark.parametrize("flag", ["--help", "--print-config", "--json-schema", "--feature-table"])
def test_the_daemon_prints_its_texts_in_any_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str, flag: str) -> None:
    from lightllmd.__main__ import main as daemon_main

    out = io.TextIOWrapper(io.BytesIO(), encoding, "strict")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["lightllmd", flag])
    assert daemon_main() == 0
    text = out.detach().getvalue().decode(encoding)
    if flag == "--json-schema":
        json.loads(text)
    assert ("1 ... 65535" in text) == (flag != "--feature-table")


@pytest.mark.parametrize("columns", ["0", "1", "-1", "many"])
def test_a_page_is_whole_whatever_width_the_environment_tells(
    daemon: Any, ctl: Any, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    whole = ctl("list-workers").out
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", "0")
    assert ctl("list-workers").out == whole != ""


# --- streams ----------------------------------------------------------------------------------------------------------

CTL, DAEMON = "lightllmctl", "lightllmd"


@pytest.mark.parametrize(
    ("program", "words", "code"),
    [(CTL, "is-ready", 0), (CTL, "nonsense", 2), (DAEMON, "--version", 0), (DAEMON, "--check /nonexistent", 78)],
)
def test_closed_streams_change_no_exit_code(daemon: Any, program: str, words: str, code: int) -> None:
    socket = f"--socket {daemon.path}" if program == CTL else ""
    for closed in ("<&- >&- 2>&-", "2>/dev/full"):
        line = f"exec {sys.executable} -m {program} {socket} {words} {closed}"
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), (closed, done.stderr)


def test_a_stream_that_takes_nothing_is_told_in_one_line(daemon: Any) -> None:
    for program, words, code in ((CTL, "version", 1), (DAEMON, "--feature-table", 71)):
        line = f"exec {sys.executable} -m {program} {words} >/dev/full"
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code
        assert re.fullmatch(rf"{program}: .*No space left on device\n", done.stderr)


def test_no_file_takes_the_place_of_a_closed_stream() -> None:
    """Else what is printed would go into it."""
    probe = (
        "from lightllmd import console; console.prepare(); import os, sys, subprocess;"
        "opened = os.open('/dev/zero', os.O_RDONLY); print('x'); print('y', file=sys.stderr); sys.stdout.flush();"
        "inner = subprocess.run([sys.executable, '-c', 'import os; [os.fstat(fd) for fd in range(3)]']).returncode;"
        "sys.exit(opened if opened < 3 else 100 + inner)"
    )
    command = ["sh", "-c", f'exec {sys.executable} -c "{probe}" <&- >&- 2>&-']
    assert subprocess.run(command, timeout=60, check=False).returncode == 100


def test_a_job_is_followed_to_its_end_though_nothing_reads_of_it(daemon: Any, answer: Any, new_job: Any) -> None:
    daemon.post("/v1/restart", new_job(phase="queued"))
    steps = [*(new_job(phase=f"phase {n}") for n in range(20)), new_job(outcome="failed", message="no")]
    daemon.get("/v1/jobs/31", answer(lines=steps))
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", CTL, "--socket", str(daemon.path), "restart"]
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGPIPE, signal.SIG_DFL),
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "lightllmctl: job #31 restart engine failed: no\n")


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["\udcff", "x" * 200_000], ids=["no text", "long"])
def test_what_no_request_can_carry_is_a_usage_error(ctl: Any, daemon: Any, name: str) -> None:
    result = ctl("logs", name)
    assert result.code == 2, result.err
    assert "internal error" not in result.err
    assert len(ctl("check", name).err) < 3000
    assert len(ctl(name).err) < 3000
    if name == "\udcff":
        assert ctl("swap", name).code == 2
