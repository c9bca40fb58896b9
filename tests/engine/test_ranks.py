"""A group of ranks as processes, with the fake back end: what rank 0 is told all do, and they end together."""

from __future__ import annotations

import os
import signal
import socket
import stat
from pathlib import Path

import psutil
import pytest

from engine_process import Connect, Start, expected
from lightllmd import errors
from lightllmd.ipc import messages
from lightllmd.ipc.endpoints import meeting_path
from long_run import LONG

long = pytest.mark.skipif(not LONG, reason="LIGHTLLMD_LONG_TESTS is not set")


@pytest.mark.parametrize("overlap", [pytest.param(False, marks=long), True])
def test_every_rank_is_ready_after_a_token_and_does_each_step(
    start: Start, connect: Connect, tmp_path: Path, overlap: bool
) -> None:
    engine = start(ranks=3, overlap=overlap, load_seconds=0.1, load_bytes=1000).wait_ready()
    assert [one.phases() for one in engine.all] == [["boot", "load", "warmup", "ready"]] * 3
    assert not Path(meeting_path(engine.endpoint)).exists()
    api = connect(engine)
    request = api.submit(1, "hello", 40)
    api.hear(lambda: len(api.tokens(request)) == 40)
    assert api.tokens(request) == expected("hello", 40)
    steps = max(one.beats()[-1].progress for one in engine.all)
    engine.hear(lambda: all(one.beats()[-1].progress >= steps and not one.beats()[-1].busy for one in engine.all))
    assert all("libtorch" not in Path(f"/proc/{one.process.pid}/maps").read_text() for one in engine.others)

    engine.link.send(messages.Stage())
    engine.hear(lambda: engine.beats()[-1].stats.get("staged_bytes") == 3000)
    assert engine.beats()[-1].stats["staged_total"] == 3000
    engine.link.send(messages.Sleep())
    engine.hear(lambda: all(one.beats()[-1].phase == "asleep" for one in engine.all))
    engine.link.send(messages.Wake())
    engine.hear(lambda: engine.beats()[-1].phase == "ready")
    api.socket.close()
    api = connect(engine, 1)
    again = api.submit(2, "again", 5)
    api.hear(lambda: len(api.tokens(again)) == 5)
    assert api.tokens(again) == expected("again", 5)

    engine.link.send(messages.Stop())
    assert engine.wait_end() == errors.EXIT_OK
    assert [one.process.returncode for one in engine.others] == [errors.EXIT_OK] * 2
    assert not (tmp_path / "engine").exists()


@long
@pytest.mark.parametrize("dead", [0, 1, 2])
def test_the_death_of_one_rank_ends_the_others_at_once(start: Start, dead: int) -> None:
    engine = start(ranks=3).wait_ready()
    engine.all[dead].process.kill()
    engine.wait_end()
    codes = [one.process.returncode for one in engine.all]
    assert codes.pop(dead) == -signal.SIGKILL
    assert codes == [errors.EXIT_RANK_GONE] * 2


@pytest.mark.parametrize(
    ("fault", "code", "kind"),
    [
        pytest.param("config", errors.EXIT_CONFIG, "config", marks=long),
        ("memory", errors.EXIT_OUT_OF_MEMORY, "memory"),
    ],
)
def test_the_rank_that_fails_says_why_and_the_others_that_it_was_not_them(
    start: Start, fault: str, code: int, kind: str
) -> None:
    engine = start(ranks=2, fault=fault, fault_rank=1)
    if fault == "config":  # it never comes to the meeting: rank 0 waits for it, and for the supervisor's word
        engine.hear(lambda: engine.others[0].process.poll() is not None)
        engine.link.send(messages.Stop())
        assert engine.wait_end() == errors.EXIT_OK
        assert not Path(meeting_path(engine.endpoint)).exists()
    else:
        assert engine.wait_end() == errors.EXIT_RANK_GONE
    assert engine.others[0].process.returncode == code
    assert engine.others[0].failures() == [kind]
    assert engine.failures() in ([], ["rank"])


@long
def test_the_meeting_is_the_users_own_and_others_are_refused(start: Start) -> None:
    engine = start(ranks=2)
    os.kill(engine.others[0].process.pid, signal.SIGSTOP)
    path = Path(meeting_path(engine.endpoint))
    engine.hear(path.exists)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for message in (b"", b"nonsense", b"\x82\xaageneration\x03\xa4rank\x07", b"\x82\xaageneration\x04\xa4rank\x01"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
            other.settimeout(30)
            other.connect(str(path))
            if message:
                other.send(message)
                assert other.recv(100) == b""
    os.kill(engine.others[0].process.pid, signal.SIGCONT)
    engine.wait_ready()
    assert not path.exists()


@long
def test_a_rank_that_hangs_falls_silent_and_keeps_no_other_from_ending(start: Start, connect: Connect) -> None:
    engine = start(ranks=2).wait_ready()
    follower = engine.others[0]
    os.kill(follower.process.pid, signal.SIGSTOP)
    psutil.Process(follower.process.pid).status()
    follower.up.clear()
    count = len(engine.beats())
    engine.hear(lambda: len(engine.beats()) > count + 3)
    assert follower.beats() == []
    engine.link.send(messages.Stop())
    engine.hear(lambda: engine.process.poll() == errors.EXIT_OK)
    follower.process.kill()
    engine.wait_end()


@long
def test_a_supervisor_that_is_gone_ends_every_rank(start: Start) -> None:
    engine = start(ranks=2).wait_ready()
    engine.others[0].link.sock.shutdown(socket.SHUT_RDWR)
    assert engine.wait_end() == errors.EXIT_OK
    assert [one.process.returncode for one in engine.others] == [errors.EXIT_OK]
