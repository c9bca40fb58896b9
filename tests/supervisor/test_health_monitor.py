"""The active health probe: who is to blame when one isn't answered, and who is only busy."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest

from harness import Daemon, generate_stream, run, wait_for
from lightllmd.config.parameters import Config
from lightllmd.ipc.messages import Prepared, Probe, Probed
from lightllmd.supervisor.workers.health_monitor import Look, Monitor, Verdict, Work, judge
from stand_ins import StandInDaemon

ILL = "boom"
SILENT = "no answer for 60 s"


# --- the verdict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "facts", "verdict"),
    [
        # still to come
        ({"a": None}, {}, None),
        ({"a": "", "b": None}, {}, None),
        # well
        ({"a": ""}, {}, Verdict()),
        ({"a": "", "b": ""}, {"late": True}, Verdict()),
        ({}, {}, Verdict()),
        # no answer: the engine, unless another worker's probe came through
        ({"a": None}, {"late": True}, Verdict(engine=SILENT)),
        ({"a": None, "b": None}, {"late": True}, Verdict(engine=SILENT)),
        ({"a": "", "b": None}, {"late": True}, Verdict(apis={"b": SILENT})),
        # errors count from the second in a row
        ({"a": ILL}, {}, Verdict()),
        ({"a": ILL}, {"errors_before": {"a": 1}}, Verdict(engine=ILL)),
        ({"a": ILL, "b": ILL}, {"errors_before": {"a": 1, "b": 1}}, Verdict(engine=ILL)),
        ({"a": ILL, "b": ""}, {"errors_before": {"a": 1}}, Verdict(apis={"a": ILL})),
        ({"a": ILL, "b": None}, {"late": True}, Verdict(engine=SILENT)),
        # the engine was restarted for it already, in vain
        ({"a": None}, {"late": True, "engine_tried": True}, Verdict(apis={"a": SILENT})),
        ({"a": ILL, "b": None}, {"late": True, "engine_tried": True}, Verdict(apis={"b": SILENT})),
    ],
)
def test_the_one_that_fails_alone_is_to_blame_else_the_engine(
    answers: dict[str, str | None], facts: dict[str, Any], verdict: Verdict[str] | None
) -> None:
    known: dict[str, Any] = {"late": False, "errors_before": {}, "engine_tried": False, **facts}
    assert judge(answers, timeout=60, **known) == verdict


# --- the excuse ------------------------------------------------------------------------------------------------------


def excused_seconds(looks: Any, seconds: float, tick: float = 0.1) -> float:
    """How much of `seconds` an engine is excused that looks like `looks(at)`."""
    work = Work(0.0, looks(0.0))
    ticks = range(1, round(seconds / tick) + 1)
    return sum(tick for number in ticks if work.excuses(number * tick, looks(number * tick)))


def test_an_engine_with_a_long_queue_that_takes_steps_is_busy_for_as_long_as_it_likes() -> None:
    assert excused_seconds(lambda at: Look(at, int(at * 500), running=64, queued=300), 600) > 595


def test_an_engine_in_the_middle_of_a_long_step_is_busy() -> None:
    """A prefill of 90 s, whose layers move `progress`; nothing is queued any more, no token comes."""
    assert excused_seconds(lambda at: Look(at, 7, running=2, queued=0), 90) > 85


def test_an_engine_whose_steps_take_seconds_is_excused_for_most_of_each() -> None:
    assert excused_seconds(lambda at: Look(at, int(at / 10), running=8, queued=0), 100) > 80


def test_an_engine_that_gives_tokens_to_others_with_an_empty_queue_has_no_excuse() -> None:
    assert excused_seconds(lambda at: Look(at, int(at * 20), running=1, queued=0), 60) < 2


def test_an_idle_engine_has_no_excuse() -> None:
    assert excused_seconds(lambda at: Look(at, 7, running=0, queued=0), 60) < 2


def test_an_engine_that_stands_still_has_no_excuse_whatever_waits() -> None:
    assert excused_seconds(lambda at: Look(0.0, 7, running=8, queued=300), 60) < 6


# --- the rounds ------------------------------------------------------------------------------------------------------


class Stub:
    """A child: what it was sent, and what was done to it."""

    def __init__(self, worker: str, number: int = 1) -> None:
        self.worker, self.number, self.ready = worker, number, True
        self.said: list[Any] = []
        self.sent: list[Any] = []
        self.aborted = ""
        self.stats: dict[str, float] = {}
        self.vitals = SimpleNamespace(moved=0.0)

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def abort(self, why: str, *, held: bool) -> None:
        self.aborted, self.ready = why, False


class Place:
    """An api worker's place."""

    def __init__(self, index: int) -> None:
        self.worker = SimpleNamespace(child=Stub(f"api-{index}"))
        self.rolling = False
        self.rolled = 0

    def roll(self) -> None:
        self.rolled += 1
        self.worker.child = Stub(self.worker.child.worker, self.worker.child.number + 1)


class Scene:
    """A monitor among stubs, with a clock that the test turns."""

    def __init__(self, apis: int = 1) -> None:
        params = msgspec.structs.replace(Config().params, health_monitor=True)
        self.events: list[tuple[str, str, str]] = []
        self.context: Any = SimpleNamespace(
            clock=SimpleNamespace(now=0.0),
            config=msgspec.structs.replace(Config(), params=params),
            events=SimpleNamespace(
                add=lambda kind, message, worker, level: self.events.append((kind, worker, message))
            ),
        )
        self.engine = Stub("engine-0")
        self.places = [Place(index) for index in range(apis)]
        for place in self.places:
            place.worker.ready = True
        self.place = SimpleNamespace(child=self.engine)
        self.engines: Any = SimpleNamespace(serving=SimpleNamespace(engines=[self.place]))
        front: Any = SimpleNamespace(
            apis=self.places,
            children=lambda: [place.worker.child for place in self.places],
            owner=lambda child: next(place for place in self.places if place.worker.child is child),
        )
        self.monitor = Monitor(self.context, self.engines, front)
        self.steady = True

    def child(self, index: int = 0) -> Stub:
        return self.places[index].worker.child

    def run(self, seconds: float, steps: float = 0.0, queued: float = 0.0) -> None:
        """The engine takes `steps` a second meanwhile."""
        for _ in range(round(seconds * 10)):
            self.context.clock.now += 0.1
            self.engine.stats |= {"waiting": queued, "running": min(queued, 1.0)}
            if steps:
                self.engine.vitals.moved = self.context.clock.now
                self.engine.stats["tokens_out"] = float(int(self.context.clock.now * steps))
            self.monitor.tick(self.steady)

    def answer(self, index: int = 0, error: str = "") -> None:
        child = self.child(index)
        child.said.append(Probed(child.sent[-1].number, error))

    def probes(self, index: int = 0) -> int:
        return sum(isinstance(message, Probe) for message in self.child(index).sent)

    def answer_next(self, error: str) -> None:
        before = self.probes()
        while self.probes() == before:
            self.run(0.1)
        self.answer(error=error)
        self.run(0.1)

    def next_engine(self) -> None:
        self.engine = self.place.child = Stub("engine-0", self.engine.number + 1)


def test_every_api_worker_is_probed_and_the_next_round_comes_an_interval_after_the_answers() -> None:
    scene = Scene(apis=2)
    scene.run(0.1)
    assert [scene.probes(0), scene.probes(1)] == [1, 1]
    scene.child(0).said.append(Prepared(2))
    scene.answer(0)
    scene.answer(1)
    scene.run(59)
    assert [scene.probes(0), scene.probes(1)] == [1, 1]
    assert scene.child(0).said == [Prepared(2)], "answers to others are left to them"
    scene.run(2)
    assert [scene.probes(0), scene.probes(1)] == [2, 2]
    assert not scene.monitor.trouble
    assert not scene.events


def test_an_engine_that_answers_nobody_is_aborted_and_probed_again_as_soon_as_it_is_back() -> None:
    scene = Scene(apis=2)
    scene.run(59)
    assert not scene.engine.aborted
    scene.run(2)
    assert scene.engine.aborted == "health probe: no answer for 60 s"
    assert scene.monitor.trouble == "health probe failed: no answer"
    scene.next_engine()
    scene.run(0.1)
    assert scene.probes() == 2
    scene.answer(0)
    scene.answer(1)
    scene.run(0.1)
    assert not scene.monitor.trouble
    assert [place.rolled for place in scene.places] == [0, 0]


def test_where_a_new_engine_did_not_help_the_api_workers_are_replaced_then_the_engine_again() -> None:
    scene = Scene()
    scene.run(61)
    scene.next_engine()
    scene.run(61)
    assert scene.places[0].rolled == 1
    assert not scene.engine.aborted
    scene.run(121)
    assert scene.engine.aborted


def test_a_busy_engine_is_left_alone_and_a_stalled_one_is_not() -> None:
    scene = Scene()
    scene.run(600, steps=5, queued=100)
    assert not scene.engine.aborted
    scene.run(67, steps=0, queued=100)
    assert scene.engine.aborted


def test_an_api_worker_that_fails_alone_is_replaced_even_while_the_queue_is_long() -> None:
    scene = Scene(apis=3)
    scene.run(0.1, steps=5, queued=100)
    scene.answer(0)
    scene.answer(2)
    scene.run(61, steps=5, queued=100)
    assert [place.rolled for place in scene.places] == [0, 1, 0]
    assert not scene.engine.aborted
    assert scene.events == [("health", "api-1", "health probe: no answer for 60 s; it is replaced")]


def test_a_refusal_while_a_queue_is_worked_on_means_nothing() -> None:
    scene = Scene()
    for _ in range(5):
        scene.run(61, steps=5, queued=100)
        scene.answer(error="the queue is full")
    assert scene.probes() >= 4
    assert not scene.engine.aborted
    assert not scene.places[0].rolled


def test_errors_count_only_when_consecutive() -> None:
    scene = Scene()
    for error in (ILL, "", ILL, ""):
        scene.answer_next(error)
        assert scene.monitor.trouble == (f"health probe failed: {ILL}" if error else "")
    assert not scene.engine.aborted
    scene.answer_next(ILL)
    scene.answer_next(ILL)
    assert scene.engine.aborted == f"health probe: {ILL}"


@pytest.mark.parametrize("why", ["a job runs", "the engine is away", "another engine", "it is switched off"])
def test_a_change_ends_the_round_without_a_verdict(why: str) -> None:
    scene = Scene()
    scene.run(50)
    old = scene.engine
    if why == "a job runs":
        scene.steady = False
    elif why == "the engine is away":
        scene.engine.ready = False
    elif why == "another engine":
        scene.next_engine()
    else:
        params = msgspec.structs.replace(scene.context.config.params, health_monitor=False)
        scene.context.config = msgspec.structs.replace(scene.context.config, params=params)
    scene.run(50)
    assert not old.aborted
    assert not scene.engine.aborted
    assert not scene.places[0].rolled
    scene.answer(error="late")
    scene.run(0.1)
    assert not scene.child().said, "what nobody waits for any more is taken out all the same"


def test_an_api_worker_that_dies_in_a_round_is_forgotten_with_it() -> None:
    scene = Scene(apis=2)
    scene.run(1)
    scene.child(1).ready = scene.places[1].worker.ready = False
    scene.answer(0)
    scene.run(0.1)
    assert not scene.monitor.trouble
    scene.run(61)
    assert (scene.probes(0), scene.probes(1)) == (2, 1)


def test_no_probe_is_sent_while_it_is_switched_off() -> None:
    scene = Scene()
    scene.context.config = Config()
    scene.run(200)
    assert not scene.probes()


# --- the daemon ------------------------------------------------------------------------------------------------------

PATIENT = ("--supervisor.abort_grace", "30")  # with a process that writes its stacks and ends
QUICK_PROBES = ("--health_monitor", "--supervisor.health_interval", "0.2", "--supervisor.health_timeout", "1", *PATIENT)


def test_an_engine_that_heartbeats_and_answers_nobody_is_replaced_with_its_stacks_kept(tmp_path: Path) -> None:
    with StandInDaemon(tmp_path, *QUICK_PROBES) as daemon:
        wait_for(lambda: len(daemon.heard("api-1", "Probe")) >= 3)
        assert daemon.worker("engine-0")["generation"] == 1
        daemon.order("live", probe=None)
        down = daemon.wait_heard("api-1", "EngineDown")
        daemon.order("live")
        assert down["cause"] == "hung: health probe: no answer for 1 s"
        daemon.wait_worker("engine-0", state="running", generation=2)
        wait_for(lambda: daemon.status()["health"] == "ready")
        with daemon.control_client() as client:
            report = client.get("/v1/crashes/1").json()
        assert report["cause"] == f"{down['cause']}; ended by SIGABRT"
        assert any("most recent call first" in line for line in report["stderr"])

        daemon.order("live", probe="boom")
        told = "ready; health probe failed: boom"
        wait_for(lambda: told in [health["reason"] for health in daemon.heard("api-1", "Health")])
        daemon.wait_heard("api-1", "EngineDown")
        daemon.order("live")
        assert daemon.worker("api-0")["generation"] == 1


def test_an_engine_whose_queue_takes_longer_than_the_deadline_is_left_alone(tmp_path: Path) -> None:
    """The whole tree: probes wait their turn behind 3 s of work while the deadline is 1 s."""
    slow = ("--engine.fake.tokens_per_second", "40", "--running_max_req_size", "2")
    with Daemon(tmp_path, *QUICK_PROBES, *slow) as daemon:

        async def all_streams() -> None:
            async with httpx.AsyncClient(timeout=60) as client:
                await asyncio.gather(
                    *(generate_stream(client, daemon.url, f"p{i}", 40, lambda: None) for i in range(6))
                )

        run(all_streams())
        status = wait_for(lambda: (now := daemon.status()) and now["requests"]["ok"] >= 6 and now)
        assert (status["generation"], status["restarts"], status["requests"]["failed"]) == (1, 0, 0)
        assert status["requests"]["ok"] == 6, "probes are nobody's requests"
        assert status["health"] == "ready"
        assert not [event for event in status["events"] if event["kind"] in ("health", "hang", "crash")]
