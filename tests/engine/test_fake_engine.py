"""The engine process with the fake back end: phases, heartbeats, tokens, faults and ends, over its real channels."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from engine_process import PATIENCE, Connect, EngineProcess, Start, expected
from lightllmd import errors
from lightllmd.engine.runners.fake_model import fake_token, seen_tokens
from lightllmd.ipc import messages
from lightllmd.ipc.images import visual_path
from lightllmd.ipc.messages import Failed, ImageSpan, Load, StepOutput
from lightllmd.ipc.waiting import wait_ready
from stand_in_visual import VisualStandIn
from vision_plans import seeing_plan


def test_it_is_ready_only_after_a_real_token_and_has_imported_no_torch(start: Start) -> None:
    engine = start(load_seconds=0.1).wait_ready()
    assert engine.phases() == ["boot", "load", "warmup", "ready"]
    ready = engine.beats()[-1]
    assert ready.stats["tokens_out"] >= 1
    assert ready.stats["slots_used"] == 0
    assert not ready.busy
    assert "libtorch" not in Path(f"/proc/{engine.process.pid}/maps").read_text()


@pytest.mark.parametrize("overlap", [False, True])
def test_streams_get_their_tokens_in_order_and_the_socket_goes_with_the_process(
    start: Start, connect: Connect, tmp_path: Path, overlap: bool
) -> None:
    engine = start(overlap=overlap).wait_ready()
    apis = [connect(engine, 0), connect(engine, 1)]
    wide = apis[0].submit(1, "hello", 50, params={"n": 3, "do_sample": True, "seed": 11})
    plain = apis[1].submit(1, "world", 70)
    replayed = apis[1].submit(2, "again", 30, replay=True, emitted=[expected("again", 10)])
    apis[0].hear(lambda: all(len(apis[0].tokens(wide, branch)) == 50 for branch in range(3)))
    for branch in range(3):
        assert apis[0].tokens(wide, branch) == expected("hello", 50, seed=11, branch=branch)
    apis[1].hear(lambda: len(apis[1].tokens(plain)) == 70)
    assert apis[1].tokens(plain) == expected("world", 70)
    last = [output for output in apis[1].heard if isinstance(output, StepOutput)][-1]
    assert last.generation == 3
    assert last.finishes == [messages.FINISH_LENGTH]
    continued = [
        (position, token)
        for output in apis[1].heard
        if isinstance(output, StepOutput)
        for request, position, token in zip(output.requests, output.positions, output.tokens, strict=True)
        if request == replayed
    ]
    assert continued == list(zip(range(10, 30), expected("again", 30, first=10), strict=True))
    engine.link.send(messages.Stop())
    assert engine.wait_end() == 0
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("busy", [False, True])
def test_sigterm_ends_it_at_once_with_0(start: Start, connect: Connect, busy: bool, tmp_path: Path) -> None:
    engine = start(tokens_per_second=50).wait_ready()
    api = connect(engine)
    if busy:
        request = api.submit(1, "x", 1000)
        api.hear(lambda: api.tokens(request))
    engine.process.terminate()
    assert engine.wait_end() == 0
    assert not (tmp_path / "engine").exists()


def test_it_ends_when_the_supervisor_is_gone(start: Start) -> None:
    engine = start().wait_ready()
    engine.link.sock.shutdown(2)
    engine.process.wait(PATIENCE)
    assert engine.process.returncode == 0


def test_progress_of_loading_is_told(start: Start) -> None:
    engine = start(load_seconds=0.3, load_bytes=1_000_000).wait_ready()
    loading = [beat for beat in engine.beats() if beat.phase == "load"]
    assert [beat.progress for beat in loading] == sorted(beat.progress for beat in loading)
    assert loading[-1].total == 1_000_000


@pytest.mark.parametrize("overlap", [False, True])
def test_idle_means_asleep(start: Start, overlap: bool) -> None:
    engine = start(overlap=overlap).wait_ready()
    process = psutil.Process(engine.process.pid)
    count, before = len(engine.beats()), process.cpu_times()
    engine.hear(lambda: len(engine.beats()) >= count + 8)
    after = process.cpu_times()
    assert after.user + after.system - before.user - before.system < 0.2, "8 heartbeats take 2 s"


@pytest.mark.parametrize("overlap", [False, True])
def test_all_rows_advance_together_at_the_pace_that_is_set(start: Start, connect: Connect, overlap: bool) -> None:
    engine = start(tokens_per_second=100, overlap=overlap).wait_ready()
    api = connect(engine)
    begun = time.monotonic()
    requests = [api.submit(i, f"p{i}", 51) for i in range(32)]
    process = psutil.Process(engine.process.pid)
    before = process.cpu_times()
    api.hear(lambda: len(api.tokens(requests[-1])) == 51)
    assert time.monotonic() - begun > 0.45, "51 tokens at 100 a second"
    assert process.cpu_times().user - before.user < 0.4, "the pace is waited for, not spun for"
    for i, request in enumerate(requests):
        api.hear(lambda request=request: len(api.tokens(request)) == 51)
        assert api.tokens(request) == expected(f"p{i}", 51)


@pytest.mark.parametrize("overlap", [False, True])
def test_load_is_told_at_once_when_it_falls_idle(start: Start, connect: Connect, overlap: bool) -> None:
    engine = start(tokens_per_second=100, overlap=overlap).wait_ready()
    api = connect(engine)
    api.hear(api.load)
    request = api.submit(1, "x", 60)
    api.hear(lambda: any(load.running for load in api.loads()))
    told = next(load for load in api.loads() if load.running)
    assert told.running == 1
    assert told.slots_used > 0
    assert told.estimated_peak > 0
    api.hear(lambda: len(api.tokens(request)) == 60)
    api.hear(lambda: api.load() == Load(3, 4000, 0, 0, 0, 0, 0.0))


@pytest.mark.parametrize("overlap", [False, True])
def test_abort_and_a_dead_api_worker_give_slots_back(start: Start, connect: Connect, overlap: bool) -> None:
    engine = start(tokens_per_second=100, overlap=overlap).wait_ready()
    api, dead = connect(engine, 0), connect(engine, 1)
    first, second = api.submit(1, "x", 3000), dead.submit(1, "y", 3000)
    api.hear(lambda: api.tokens(first))
    api.socket.send(messages.Abort(first))
    dead.hear(lambda: dead.tokens(second))
    engine.hear(lambda: engine.beats()[-1].stats["slots_used"])
    engine.link.send(messages.ApiGone(1, 1))
    dead.submit(2, "late", 500)
    engine.hear(lambda: not engine.beats()[-1].busy and engine.beats()[-1].stats["slots_used"] == 0)


def test_an_impossible_request_is_rejected(start: Start, connect: Connect) -> None:
    engine = start(slots=100).wait_ready()
    api = connect(engine)
    impossible = api.submit(1, "x" * 90, 20)
    api.hear(lambda: any(isinstance(message, messages.Rejected) for message in api.heard))
    (rejected,) = (message for message in api.heard if isinstance(message, messages.Rejected))
    assert (rejected.request, rejected.reason, rejected.generation) == (impossible, "invalid", 3)


@pytest.mark.parametrize(
    ("way", "code"),
    [("SIGSEGV", -11), ("SIGKILL", -9), ("SIGABRT", -6), ("exit", 1), ("exception", errors.EXIT_FAILED)],
)
def test_poison_ends_the_engine_in_the_step_that_runs_it(start: Start, connect: Connect, way: str, code: int) -> None:
    engine = start(poison="arsenic", poison_way=way, tokens_per_second=100).wait_ready()
    api = connect(engine)
    proven = api.submit(1, "harmless", 1000)
    api.hear(lambda: api.tokens(proven))
    engine.hear(lambda: engine.flight().kind == "decode")
    assert engine.flight().unproven == []
    guilty = api.submit(2, "some arsenic please", 5)
    assert engine.wait_end() == code
    flight = engine.flight()
    assert flight.unproven == [guilty], "who has had a token is no suspect"
    assert (flight.kind, flight.rows, flight.tokens) == ("prefill", 1, len("some arsenic please"))
    if way == "exception":
        assert engine.up[-1] == Failed("error", "the fake engine was poisoned")
        assert "Traceback" in engine.stderr.read_text()


def test_a_step_launched_behind_a_prefill_hides_none_of_its_requests(start: Start, connect: Connect) -> None:
    """With overlap the engine dies of a prefill when the next step is out already."""
    engine = start(poison="arsenic", tokens_per_second=100, overlap=True).wait_ready()
    api = connect(engine)
    proven = api.submit(1, "harmless", 1000)
    api.hear(lambda: api.tokens(proven))
    engine.hear(lambda: engine.flight().kind == "decode" and not engine.flight().unproven)
    guilty = api.submit(2, "some arsenic please", 5)
    assert engine.wait_end() == -signal.SIGSEGV
    flight = engine.flight()
    assert flight.unproven == [guilty]
    assert (flight.kind, flight.rows, flight.tokens) == ("decode", 2, 2)


def test_a_suspects_step_is_recorded_as_quarantined(start: Start, connect: Connect) -> None:
    engine = start(poison="arsenic", tokens_per_second=100).wait_ready()
    api = connect(engine)
    innocent = api.submit(1, "harmless", 1000)
    api.hear(lambda: api.tokens(innocent))
    assert engine.flight().quarantined == 0
    guilty = api.submit(2, "some arsenic please", 5, replay=True, suspect=1)
    assert engine.wait_end() == -signal.SIGSEGV
    flight = engine.flight()
    assert (flight.unproven, flight.quarantined, flight.rows) == ([guilty], guilty, 1)


def test_poison_that_hangs_falls_silent_and_shows_its_stack(start: Start, connect: Connect) -> None:
    engine = start(poison="arsenic", poison_way="hang").wait_ready()
    guilty = connect(engine).submit(1, "arsenic", 5)
    engine.hear(lambda: engine.flight().unproven == [guilty])
    silent(engine)
    engine.process.send_signal(signal.SIGABRT)
    assert engine.wait_end() == -signal.SIGABRT
    assert "fake.py" in engine.stderr.read_text()


def silent(engine: EngineProcess) -> None:
    """Nothing more comes, for six times the interval of heartbeats; a few may have been on their way."""
    for _ in range(5):
        engine.up += engine.link.receive()
        readable = wait_ready([engine.link], 1.5)
        if not readable:
            return
    raise AssertionError("heartbeats go on")


@pytest.mark.parametrize(
    ("fault", "code", "kind", "last_phase"),
    [
        ("exit_at_boot", 1, None, "boot"),
        ("config", errors.EXIT_CONFIG, "config", "boot"),
        ("memory", errors.EXIT_OUT_OF_MEMORY, "memory", "load"),
        ("crash_in_load", -11, None, "load"),
    ],
)
def test_faults_end_it_where_and_as_they_say(
    start: Start, fault: str, code: int, kind: str | None, last_phase: str
) -> None:
    engine = start(fault=fault, load_seconds=0.1)
    assert engine.wait_end() == code
    assert [message.kind for message in engine.up if isinstance(message, Failed)] == ([kind] if kind else [])
    assert engine.phases()[-1] == last_phase


@pytest.mark.parametrize(("fault", "phase"), [("hang_in_load", "load"), ("hang_when_ready", "ready")])
def test_faults_that_hang_fall_silent(start: Start, fault: str, phase: str) -> None:
    engine = start(fault=fault, load_seconds=0.2)
    engine.hear(lambda: engine.phases()[-1:] == [phase])
    silent(engine)


def test_a_fault_with_a_file_acts_only_while_the_file_exists(start: Start, tmp_path: Path) -> None:
    engine = start(fault="exit_at_boot", fault_file=str(tmp_path / "broken")).wait_ready()
    assert engine.process.poll() is None


def test_a_fault_file_beside_the_model_names_the_fault_of_that_model(start: Start, tmp_path: Path) -> None:
    (tmp_path / "fault").write_text("memory\n")
    engine = start(params={"model_dir": str(tmp_path)}, fault_file="fault")
    assert engine.process.wait(PATIENCE) == errors.EXIT_OUT_OF_MEMORY


def test_two_model_dirs_have_two_answers(start: Start, connect: Connect) -> None:
    engine = start(params={"model_dir": "/models/other"}).wait_ready()
    api = connect(engine)
    request = api.submit(1, "x", 8)
    api.hear(lambda: len(api.tokens(request)) == 8)
    expected = [fake_token(list(b"x"), 0, 0, position, "/models/other") for position in range(8)]
    assert api.tokens(request) == expected != [fake_token(list(b"x"), 0, 0, position) for position in range(8)]


@pytest.mark.parametrize("overlap", [False, True])
def test_statistics_are_logged_while_a_batch_runs_and_metrics_are_counted(
    start: Start, connect: Connect, overlap: bool
) -> None:
    engine = start(tokens_per_second=100, overlap=overlap).wait_ready()
    api = connect(engine)
    request = api.submit(1, "x", 40)
    api.hear(lambda: len(api.tokens(request)) == 40)
    api.hear(lambda: api.load() and api.load().running == 0)
    lines = re.findall(
        r"<6>avg tokens \(prompt\+generate\) throughput ([\d.]+) tokens/s, .*", engine.stderr.read_text()
    )
    assert lines
    assert float(lines[-1]) > 0
    from lightllmd.observe.metrics import render

    text = render(engine.metrics).decode()
    assert 'lightllm_batch_inference_count_total{method="decode"} 39.0' in text
    assert 'lightllm_batch_inference_duration_bucket_bucket{le="+Inf",method="prefill"} 1.0' in text
    assert "lightllm_request_queue_duration_bucket_count 1.0" in text
    assert "lightllm_batch_current_size 0.0" in text


def test_disable_log_stats_is_obeyed(start: Start, connect: Connect) -> None:
    engine = start(tokens_per_second=200, params={"disable_log_stats": True}).wait_ready()
    api = connect(engine)
    request = api.submit(1, "x", 40)
    api.hear(lambda: len(api.tokens(request)) == 40)
    assert "throughput" not in engine.stderr.read_text()


def test_a_request_with_images_waits_and_others_pass(start: Start, connect: Connect, tmp_path: Path) -> None:
    engine = start(plan=seeing_plan(slots=400)).wait_ready()
    api = connect(engine)
    prompt, values = "a?????b", bytes(range(80))
    span = ImageSpan(1, 5, b"k" * 16)
    seeing = api.submit(1, prompt, 6, images=[span])
    text = api.submit(2, "text", 6)
    api.hear(lambda: len(api.tokens(text)) == 6)
    assert api.tokens(seeing) == []
    visual = VisualStandIn(visual_path(str(tmp_path), 1))
    visual.known = {span.key: ((1, 5, 4), values)}

    def answered() -> bool:
        visual.serve()
        return len(api.tokens(seeing)) == 6

    api.hear(answered)
    visual.die()
    seen = [ord("a"), *seen_tokens(values, 1, 5), ord("b")]
    assert api.tokens(seeing) == [fake_token(seen, 0, 0, position) for position in range(6)]
