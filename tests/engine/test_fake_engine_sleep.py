"""The engine process with the fake back end is put to sleep and woken."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import pytest

from engine_process import Api, Connect, EngineProcess, Start, expected
from lightllmd import errors
from lightllmd.ipc import messages
from lightllmd.ipc.messages import StepOutput


def last_phases(engine: EngineProcess, since: int) -> list[str]:
    return list(dict.fromkeys(beat.phase for beat in engine.beats()[since:]))


def put_to_sleep(engine: EngineProcess, *before: messages.Down) -> None:
    for message in (*before, messages.Sleep()):
        engine.link.send(message)
    engine.hear(lambda: engine.beats()[-1].phase == "asleep")


def wake(engine: EngineProcess) -> list[str]:
    """The phases that it went through."""
    since = len(engine.beats())
    engine.link.send(messages.Wake())
    engine.hear(lambda: engine.beats()[-1].phase == "ready")
    return [phase for phase in last_phases(engine, since) if phase != "asleep"]


@pytest.mark.parametrize("overlap", [False, True])
def test_it_sleeps_and_wakes_at_its_endpoint_with_the_same_tokens(
    start: Start, connect: Connect, overlap: bool
) -> None:
    engine = start(overlap=overlap, load_bytes=1_000_000, load_seconds=0.3).wait_ready()
    engine.link.send(messages.Stage())
    engine.hear(lambda: "staged_bytes" in engine.beats()[-1].stats)
    staged = engine.beats()[-1].stats
    assert staged["staged_bytes"] == staged["staged_total"] == 1_000_000
    put_to_sleep(engine)
    asleep = engine.beats()[-1]
    assert not asleep.busy
    assert asleep.stats["memory_asleep"] == 0
    count = len(engine.beats())
    engine.hear(lambda: len(engine.beats()) >= count + 3)
    assert wake(engine) == ["load", "warmup", "ready"]
    assert "staged_bytes" not in engine.beats()[-1].stats, "the copy is let go of"
    api = connect(engine)
    request = api.submit(1, "hello", 20)
    api.hear(lambda: len(api.tokens(request)) == 20)
    assert api.tokens(request) == expected("hello", 20)


@pytest.mark.parametrize("staged", [False, True])
def test_only_what_was_not_staged_is_loaded_again(start: Start, staged: bool) -> None:
    engine = start(load_bytes=1_000_000, load_seconds=0.6).wait_ready()
    put_to_sleep(engine, *([messages.Stage()] if staged else []))
    before = len(engine.beats())
    wake(engine)
    loaded = [beat.progress for beat in engine.beats()[before:] if beat.phase == "load"]
    assert (max(loaded) > 0) != staged


@pytest.mark.parametrize("overlap", [False, True])
def test_requests_that_are_left_are_dropped_by_sleep(start: Start, connect: Connect, overlap: bool) -> None:
    """Their api workers hold them; they come back as replays."""
    engine = start(overlap=overlap, tokens_per_second=100).wait_ready()
    api = connect(engine)
    request = api.submit(1, "hello", 200)
    api.hear(lambda: api.tokens(request))
    put_to_sleep(engine)
    late = api.submit(2, "late", 5)  # its api worker had not heard of it yet
    count = len(engine.beats())
    engine.hear(lambda: len(engine.beats()) >= count + 2)
    assert engine.beats()[-1].stats["running"] == engine.beats()[-1].stats["slots_used"] == 0
    api.socket.close()
    wake(engine)
    assert engine.flight().unproven == []
    again = connect(engine, 1)  # as another worker: the engine may not have heard yet that this one is gone
    emitted = expected("hello", 7)
    replayed = again.submit(1, "hello", 10, replay=True, emitted=[emitted])
    again.hear(lambda: any(finish for output in _outputs(again) for finish in output.finishes))
    outputs = _outputs(again)
    assert [token for output in outputs for token in output.tokens] == expected("hello", 10, first=7)
    assert {request for output in outputs for request in output.requests} == {replayed}
    assert late not in {request for output in outputs for request in output.requests}


def _outputs(api: Api) -> list[StepOutput]:
    return [message for message in api.heard if isinstance(message, StepOutput)]


def test_orders_that_come_while_it_loads_are_obeyed_in_turn(start: Start) -> None:
    engine = start(load_seconds=0.4, load_bytes=1_000)
    for message in (messages.Stage(), messages.Sleep(), messages.Wake(), messages.Sleep()):
        engine.link.send(message)
    once = ["load", "warmup", "ready", "sleep", "asleep"]

    def changes() -> list[str]:
        told = [beat.phase for beat in engine.beats()]
        return [phase for phase, before in zip(told, ["", *told], strict=False) if phase != before]

    engine.hear(lambda: changes().count("asleep") == 2)
    assert changes() == ["boot", *once, *once]


def test_what_was_staged_for_nothing_is_let_go_of(start: Start) -> None:
    engine = start(load_bytes=1_000).wait_ready()
    engine.link.send(messages.Stage())
    engine.hear(lambda: "staged_bytes" in engine.beats()[-1].stats)
    engine.link.send(messages.Wake())
    engine.hear(lambda: "staged_bytes" not in engine.beats()[-1].stats)
    assert engine.beats()[-1].phase == "ready"


def test_a_fault_on_the_way_back_ends_it_as_in_a_load(start: Start, tmp_path: Path) -> None:
    engine = start(fault="memory", fault_file=str(tmp_path / "full")).wait_ready()
    put_to_sleep(engine)
    (tmp_path / "full").touch()
    engine.link.send(messages.Wake())
    assert engine.wait_end() == errors.EXIT_OUT_OF_MEMORY


@pytest.mark.parametrize("way", [signal.SIGTERM, "stop"])
def test_it_ends_from_its_sleep_at_once_with_0(start: Start, way: int | str) -> None:
    engine = start().wait_ready()
    put_to_sleep(engine)
    if way == "stop":
        engine.link.send(messages.Stop())
    else:
        engine.process.terminate()
    assert engine.wait_end() == 0


def test_live_settings_are_obeyed(start: Start, connect: Connect) -> None:
    engine = start(tokens_per_second=200).wait_ready()
    engine.link.send(messages.Tune("debug", math.inf, 10.0))
    api = connect(engine)
    request = api.submit(1, "x", 60)
    api.hear(lambda: len(api.tokens(request)) == 60)
    assert "throughput" not in engine.stderr.read_text()
    put_to_sleep(engine)
    assert "<7>asleep after" in engine.stderr.read_text()
