"""The engine process with the fake back end: phases, heartbeats, tokens, faults and ends, over its real channels."""

from __future__ import annotations

import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from lightllmd import errors
from lightllmd.config.parameters import Config, EngineSettings, FakeSettings, Params
from lightllmd.config.plan import Budget, DeviceFacts, Plan, encode_plan
from lightllmd.engine.fake_model import fake_token
from lightllmd.ipc import bus, channel, flight_record, messages
from lightllmd.ipc.messages import Failed, Heartbeat, Load, SamplingParams, StepOutput, Submit

PATIENCE = 60.0  # seconds; a bound, never a measure


class EngineProcess:
    """A spawned engine and the supervisor's ends of its channels."""

    def __init__(
        self, folder: Path, *, params: dict[str, object] | None = None, slots: int = 4000, **fake: object
    ) -> None:
        metrics = folder / "metrics"
        metrics.mkdir()
        self.metrics = str(metrics)
        self.endpoint = f"ipc://{folder}/engine"
        plan = Plan(
            config=Config(
                params=Params(**(params or {})), engine=EngineSettings(backend="fake", fake=FakeSettings(**fake))
            ),
            model=None,
            device=DeviceFacts("cpu", "test", 1, 1, 1, [], 1),
            derived=[],
            budget=Budget([], 0),
            max_total_token_num=slots,
            batch_max_tokens=slots,
            eos_id=[256],
            data_type="float32",
            tokenizer_mode="fast",
            log_stats_interval=0.05,
            vocab_size=257,
            model_name="fake",
        )
        self.flight_fd = flight_record.create()
        self.link, theirs = channel.pair()
        words = [str(number) for number in (theirs.fileno(), os.getpid(), self.flight_fd)]
        with (folder / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lightllmd.engine", *words],
                pass_fds=[theirs.fileno(), self.flight_fd],
                stderr=stderr,
            )
        theirs.close()
        self.stderr = folder / "stderr"
        self.up: list[messages.Up] = []  # all that it said to the supervisor
        self.link.send(messages.EngineConfigure(encode_plan(plan), 3, 0, self.endpoint, self.metrics, "engine-0"))

    def hear(self, until: Callable[[], object]) -> None:
        """Takes in messages until a condition holds."""
        deadline = time.monotonic() + PATIENCE
        while not until():
            assert time.monotonic() < deadline, (self.up[-3:], self.stderr.read_text())
            select.select([self.link], [], [], 0.05)
            self.up += self.link.receive()

    def phases(self) -> list[str]:
        return list(dict.fromkeys(beat.phase for beat in self.beats()))

    def beats(self) -> list[Heartbeat]:
        return [message for message in self.up if isinstance(message, Heartbeat)]

    def wait_ready(self) -> EngineProcess:
        self.hear(lambda: "ready" in self.phases())
        return self

    def wait_end(self) -> int:
        self.hear(lambda: self.process.poll() is not None)
        self.up += self.link.receive()
        return self.process.returncode

    def flight(self) -> flight_record.Flight:
        return flight_record.read(self.flight_fd)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.link.close()
        os.close(self.flight_fd)
        Path(self.endpoint.removeprefix("ipc://")).unlink(missing_ok=True)


class Api:
    """An api worker's end."""

    def __init__(self, engine: EngineProcess, number: int = 0) -> None:
        self.number = number
        self.socket = bus.ApiSocket(engine.endpoint, number, 1)
        self.heard: list[messages.ToApi] = []

    def submit(self, sequence: int, prompt: str, tokens: int, **fields: object) -> int:
        request = messages.request_id(self.number, 1, sequence)
        params = SamplingParams(max_new_tokens=tokens, **fields.pop("params", {}))
        values = {"branches": list(range(params.n)), "emitted": [[] for _ in range(params.n)]} | fields
        prompt_ids = list(prompt.encode())
        self.socket.send(Submit(request, self.number, 1, time.monotonic_ns(), prompt_ids, params, **values))
        return request

    def hear(self, until: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not until():
            assert time.monotonic() < deadline, self.heard[-3:]
            self.socket.socket.poll(50)
            self.heard += self.socket.receive()

    def tokens(self, request: int, branch: int = 0) -> list[int]:
        """In order; asserts that positions are contiguous."""
        found: list[int] = []
        for output in self.heard:
            if isinstance(output, StepOutput):
                for key, position, token in zip(
                    zip(output.requests, output.branches, strict=True), output.positions, output.tokens, strict=True
                ):
                    if key == (request, branch):
                        assert position == len(found)
                        found.append(token)
        return found

    def load(self) -> Load | None:
        return next((message for message in reversed(self.heard) if isinstance(message, Load)), None)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., EngineProcess]]:
    started: list[EngineProcess] = []

    def spawn(**settings: object) -> EngineProcess:
        started.append(EngineProcess(tmp_path, **settings))
        return started[-1]

    yield spawn
    for engine in started:
        engine.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., Api]]:
    connected: list[Api] = []

    def make(engine: EngineProcess, number: int = 0) -> Api:
        connected.append(Api(engine, number))
        return connected[-1]

    yield make
    for api in connected:
        api.socket.close()


Start = Callable[..., EngineProcess]
Connect = Callable[..., Api]


def expected(prompt: str, count: int, seed: int = 0, branch: int = 0, first: int = 0) -> list[int]:
    return [fake_token(list(prompt.encode()), seed, branch, position) for position in range(first, count)]


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


def test_progress_of_loading_and_heartbeats_while_idle(start: Start) -> None:
    engine = start(load_seconds=1.2, load_bytes=1_000_000)
    engine.wait_ready()
    loading = [beat for beat in engine.beats() if beat.phase == "load"]
    assert len(loading) >= 4, "a heartbeat every half second at least"
    assert [beat.progress for beat in loading] == sorted(beat.progress for beat in loading)
    assert loading[-1].total == 1_000_000
    count = len(engine.beats())
    begun = time.monotonic()
    engine.hear(lambda: len(engine.beats()) >= count + 8)
    assert time.monotonic() - begun < 8 * 0.5 + 1


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
    api.hear(lambda: api.load().running == 1)
    assert api.load().slots_used > 0
    assert api.load().estimated_peak > 0
    api.hear(lambda: len(api.tokens(request)) == 60)
    api.hear(lambda: api.load() == Load(3, 4000, 0, 0, 0, 0, 0.0))


@pytest.mark.parametrize("overlap", [False, True])
def test_abort_and_a_dead_api_worker_give_slots_back(start: Start, connect: Connect, overlap: bool) -> None:
    engine = start(tokens_per_second=100, overlap=overlap).wait_ready()
    api, dead = connect(engine, 0), connect(engine, 1)
    first, second = api.submit(1, "x", 3000), dead.submit(1, "y", 500)
    api.hear(lambda: api.tokens(first))
    api.socket.send(messages.Abort(first))
    dead.hear(lambda: dead.tokens(second))
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
        readable, _, _ = select.select([engine.link], [], [], 1.5)
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


# --- sleep ----------------------------------------------------------------------------------------------------------


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
    engine.hear(lambda: engine.phases()[-1:] and engine.beats()[-1].phase == "asleep")
    told = [beat.phase for beat in engine.beats()]
    changes = [phase for phase, before in zip(told, ["", *told], strict=False) if phase != before]
    once = ["load", "warmup", "ready", "sleep", "asleep"]
    assert changes == ["boot", *once, *once]


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
