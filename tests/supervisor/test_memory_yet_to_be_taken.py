"""Swaps while an engine starts or is about to, in the simulated world: its plan counts as taken before it is taken."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from lightllmd.supervisor.change.handover import Terms
from lightllmd.supervisor.control.jobs import RunningJob
from lightllmd.supervisor.control.verbs import Caller
from supervisor import simulation
from supervisor.simulated_api import Api
from supervisor.simulated_models import configuration
from supervisor.simulation import Simulation


class World:
    """`large` fits alone, and beside nothing."""

    def __init__(self) -> None:
        self.simulation = Simulation(configuration(**{"engine.memory_fraction": 1.0}))
        self.order = random.Random(0)
        self.pass_time(30)
        assert self.simulation.supervisor.state == "serving"

    def pass_time(self, ticks: int) -> None:
        for _ in range(ticks):
            self.simulation.tick(self.order)
            assert not self.simulation.violations

    def swap(self, model: str, terms: Terms | None = None) -> RunningJob:
        verbs = self.simulation.supervisor.verbs
        job = self.simulation.ask(lambda: verbs.swap(Caller(), model, terms or Terms()))
        assert isinstance(job, RunningJob)
        return job

    def finish(self, job: RunningJob) -> None:
        for _ in range(60):
            if job.finished:
                break
            self.pass_time(1)
        assert job.snapshot.outcome == "done", job.snapshot


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.simulation.close()


@pytest.mark.parametrize("ticks", range(6))
@pytest.mark.parametrize("order", range(2))
def test_a_plan_counts_what_an_engine_between_two_starts_will_take(world: World, order: int, ticks: int) -> None:
    """Also where it starts, or becomes ready, while the facts of that plan are read."""
    world.order = random.Random(order)
    world.simulation.supervisor.engines.serving.engines[0].child.process.die(-9)
    world.pass_time(ticks)
    job = world.swap("large")
    world.finish(job)
    assert job.snapshot.details["how"] == "after"


def test_a_plan_counts_what_a_leaving_engine_will_take_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Api, "finishable", lambda self: [])
    engines = world.simulation.supervisor.engines
    world.simulation.apis()[0].program.open()
    world.finish(world.swap("second", Terms(drain_timeout=0.0)))
    (leaving,) = engines.leaving
    room_for_two = engines.serving.plan.budget.needed + leaving.plan.budget.taken
    monkeypatch.setattr(simulation, "DEVICE", room_for_two + leaving.plan.budget.taken // 2)
    leaving.engines[0].child.process.die(-9)
    while leaving.engines[0].child is not None:
        world.pass_time(1)
    job = world.swap("first")
    world.finish(job)
    assert job.snapshot.details["how"] == "after"
    assert leaving in engines.leaving
    world.pass_time(10)
