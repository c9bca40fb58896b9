"""A GPU that is lost is named, and with ``[engine] degrade`` the daemon serves on with those that are left."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lightllmd.supervisor.control import status
from supervisor.simulated_models import configuration
from supervisor.simulation import DEVICES, Simulation


class World(Simulation):
    """It serves on all its devices."""

    def __init__(self, degrade: bool) -> None:
        super().__init__(configuration(**{"tp": DEVICES, "http.workers": 1, "engine.degrade": degrade}))
        self.order = random.Random(0)
        self.until(lambda: self.supervisor.state == "serving")

    def until(self, condition: Callable[[], object], most: int = 300) -> None:
        for _ in range(most):
            if condition():
                return
            self.tick(self.order)
        raise AssertionError("\n".join(event.message for event in self.context.events.feed.last(20)))

    def lose(self, device: int) -> None:
        """As a GPU that falls off the bus takes its process along."""
        self.lost.add(device)
        engine = self.supervisor.engines.serving.engines[0]
        process: Any = engine.generation.ranks[device].child.process
        process.die(-signal.SIGABRT)

    def said(self, what: str) -> bool:
        return any(what in event.message for event in self.context.events.feed.last(100))


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(request.param)
    yield made
    assert not made.violations
    made.close()


@pytest.mark.parametrize("world", [True], indirect=True)
def test_the_daemon_serves_on_with_the_gpus_that_are_left(world: World) -> None:
    world.apis()[0].program.open()
    world.lose(1)
    world.until(lambda: world.supervisor.state == "serving" and world.supervisor.plan.ranks < DEVICES)
    plan = world.supervisor.plan
    assert (plan.ranks, plan.devices) == (2, [0, 2])
    assert world.said("lost: GPU 1 (Simulated GPU): GPU is lost")
    assert status.build(world.supervisor).lost_devices == ["GPU 1 (Simulated GPU): GPU is lost"]
    assert any("engine.degrade" in warning for warning in plan.warnings)
    (job,) = world.supervisor.verbs.jobs.all()
    assert (job.verb, job.outcome) == ("reload", "done")
    world.until(lambda: world.supervisor.front.total("ok") == 1)
    assert world.supervisor.front.total("failed") == world.supervisor.front.total("cancelled") == 0
    devices = [process.device for process in world.supervisor.engines.serving.engines[0].generation.ranks]
    assert devices == [0, 2]
    assert len(world.supervisor.crashes.all()) <= 2


@pytest.mark.parametrize("world", [False], indirect=True)
def test_without_leave_to_degrade_it_says_which_gpu_is_lost_and_keeps_to_its_plan(world: World) -> None:
    world.lose(1)
    world.until(lambda: status.build(world.supervisor).lost_devices)
    for _ in range(40):
        world.tick(world.order)
    assert status.build(world.supervisor).lost_devices == ["GPU 1 (Simulated GPU): GPU is lost"]
    assert world.supervisor.state == "degraded"
    assert world.supervisor.plan.ranks == DEVICES
    assert not world.supervisor.verbs.jobs.all()


@pytest.mark.parametrize("world", [True], indirect=True)
def test_an_engine_that_dies_with_all_gpus_there_loses_none(world: World) -> None:
    process: Any = world.supervisor.engines.serving.engines[0].child.process
    process.die(-signal.SIGKILL)
    world.until(lambda: world.supervisor.state == "serving" and world.supervisor.engines.serving.number == 2)
    assert not status.build(world.supervisor).lost_devices
    assert not world.supervisor.verbs.jobs.all()
