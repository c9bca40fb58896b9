"""An exception that has no name among our errors: the job that it is raised in has failed and is undone as any other,
a report is kept, and the daemon goes on; where there is no job it ends, and never with exit code 0."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lightllmd.errors import EXIT_FAILED, LightllmdError
from lightllmd.supervisor.change.handover import Terms
from lightllmd.supervisor.change.placement import Placement
from lightllmd.supervisor.change.settings import Settings
from lightllmd.supervisor.change.switch import Switch
from lightllmd.supervisor.control.jobs import RunningJob
from lightllmd.supervisor.control.verbs import Caller, Verbs
from lightllmd.supervisor.workers.api_workers import ApiWorkers
from lightllmd.supervisor.workers.engines import Engines
from lightllmd.supervisor.workers.generation import Engine
from supervisor.simulated_models import configuration
from supervisor.simulation import Simulation
from supervisor.supervisor_truths import Truths
from supervisor.test_supervisor_model import EDITS


class World:
    def __init__(self) -> None:
        self.simulation = Simulation(configuration(), traffic=0.2)
        self.truths = Truths(self.simulation)
        self.supervisor = self.simulation.supervisor
        self.until(lambda: self.supervisor.state == "serving")

    def tick(self, check: bool = True) -> None:
        self.simulation.tick(random.Random(0))
        assert not check or not self.truths.broken()

    def until(self, condition: Callable[[], Any], ticks: int = 200) -> None:
        for _ in range(ticks):
            if condition():
                return
            self.tick()
        raise AssertionError("it did not come to that")

    def ask(self, verb: str, *arguments: Any) -> RunningJob | LightllmdError | None:
        answer = self.simulation.ask(lambda: getattr(self.supervisor.verbs, verb)(Caller(), *arguments))
        self.truths.broken()  # which takes down what is in force as the job begins
        return answer


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.simulation.close()


def refuse(*_: Any, **__: Any) -> Any:
    raise OverflowError("int too large to convert to float")


MODEL = ("swap", "large", Terms())  # which does not fit beside the other
PLACES = [
    (MODEL, Placement, "decide"),
    (MODEL, Switch, "_make_room"),
    (MODEL, Engines, "propose"),
    (MODEL, Engine, "stage"),
    (MODEL, Engine, "sleep"),
    (MODEL, ApiWorkers, "hold"),
    (MODEL, ApiWorkers, "none_of"),
    (MODEL, ApiWorkers, "prepare"),
    (MODEL, ApiWorkers, "prepared"),
    (("reload", False), ApiWorkers, "resize"),
    (("reload", False), Settings, "reread"),
    (("restart",), Engine, "restart"),
    (("drain",), ApiWorkers, "drained_since_now"),
    (("flush_cache",), Verbs, "_flush_cache"),
    (("reset_failed",), Verbs, "_reset_failed"),
]


@pytest.mark.parametrize(("call", "owner", "name"), PLACES, ids=[f"{c[0]}-{n}" for c, _, n in PLACES])
def test_a_fault_in_a_job_fails_that_job_alone(
    call: tuple[Any, ...], owner: type, name: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.simulation.file = EDITS["more workers"](world.simulation.settings.written)
    if owner is Settings:
        monkeypatch.setattr(world.simulation.settings, name, refuse)
    else:
        monkeypatch.setattr(owner, name, refuse)
    if call[0] == "flush_cache":
        monkeypatch.setattr(Verbs, "check_cached", lambda verbs: None)
    job = world.ask(*call)
    if isinstance(job, RunningJob):
        world.until(lambda: job.finished)
        assert job.snapshot.outcome == "failed", job.snapshot
        assert "OverflowError: int too large" in job.snapshot.message
    else:
        assert isinstance(job, LightllmdError)
        assert "OverflowError: int too large" in job.message
    monkeypatch.undo()
    (report,) = world.supervisor.crashes.all()
    assert (report.worker, report.signal) == ("lightllmd", None)
    assert any("refuse" in line for line in world.supervisor.crashes.get(report.id).stderr)
    world.ask("resume")
    world.until(lambda: world.supervisor.state == "serving" and not world.supervisor.front.holding)
    again = world.ask("swap", "second", Terms())
    assert isinstance(again, RunningJob)
    world.until(lambda: again.finished)
    assert again.snapshot.outcome == "done"


@pytest.mark.parametrize(("owner", "name"), [(ApiWorkers, "tick"), (Engines, "stop")])
def test_a_fault_outside_of_any_other_job_ends_the_daemon_with_a_report_and_not_with_0(
    world: World, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    monkeypatch.setattr(owner, name, refuse)
    if name == "stop":
        world.simulation.signal(signal.SIGTERM)
    for _ in range(60):
        world.tick(check=False)
    monkeypatch.undo()
    for _ in range(50):
        if world.simulation.task.done():
            break
        world.tick(check=False)
    assert world.simulation.task.result() == EXIT_FAILED
    (report,) = [crash for crash in world.supervisor.crashes.all() if crash.worker == "lightllmd"]
    assert report.cause == "internal error: OverflowError: int too large to convert to float"
    assert world.simulation.context.events.feed.last(1)[0].message == f"stopped, exit code {EXIT_FAILED}"
