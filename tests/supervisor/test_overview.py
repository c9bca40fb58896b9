"""What api workers are told of the daemon for their page: all that changed, at most once a second."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lightllmd.ipc.messages import Health, Overview
from supervisor import simulated_children
from supervisor.simulated_models import configuration
from supervisor.simulation import TICK, Simulation


class World:
    def __init__(self, **flags: Any) -> None:
        self.simulation = Simulation(configuration(**flags), traffic=0.0)

    def ticks(self, count: int) -> None:
        for _ in range(count):
            self.simulation.tick(random.Random(0))

    def until(self, condition: Callable[[], Any]) -> Any:
        for _ in range(400):
            if value := condition():
                return value
            self.ticks(1)
        raise AssertionError("it did not come to that")

    @property
    def told(self) -> list[Overview]:
        """By the first of the living api workers."""
        ledger = self.simulation.apis()[0].ledger
        return [message for message in ledger if isinstance(message, Overview)]


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(**getattr(request, "param", {}))
    yield world
    world.simulation.close()


def ready(world: World) -> bool:
    return world.simulation.supervisor.state == "serving"


def test_workers_are_told_how_all_others_are(world: World) -> None:
    world.until(lambda: ready(world))
    world.ticks(10)
    overview = world.told[-1]
    assert overview.sentence.startswith("Serving")
    assert [(one.name, one.state, one.restarts, one.ready) for one in overview.workers] == [
        ("api-0", "running", 0, True),
        ("api-1", "running", 0, True),
        ("engine-0", "running", 0, True),
    ]
    assert overview.started == world.simulation.supervisor.started


def test_what_is_said_beside_a_new_health_is_no_older_than_it(world: World) -> None:
    world.until(lambda: ready(world))
    world.ticks(10)
    ledger = world.simulation.apis()[0].ledger
    before = len(ledger)
    engine = world.simulation.engine(world.simulation.supervisor.engines.serving.engines[0].worker.number)
    assert engine is not None
    engine.process.die(-9)
    world.until(lambda: any(isinstance(message, Health) and message.ready for message in ledger[before:]))
    for ready_again in (False, True):
        at = next(
            index
            for index, message in enumerate(ledger)
            if index >= before and isinstance(message, Health) and message.ready == ready_again
        )
        newest = [message for message in ledger[:at] if isinstance(message, Overview)][-1]
        assert newest.sentence.startswith("Serving") == ready_again


@pytest.mark.parametrize("world", [{"supervisor.hang_timeout": 120.0}], indirect=True)
def test_a_worker_that_did_not_read_is_told_the_latest_when_it_does(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulated_children, "BUFFERED", 1)
    world.until(lambda: ready(world))
    world.ticks(10)
    one = world.simulation.apis()[0]
    engine = world.simulation.engine(world.simulation.supervisor.engines.serving.engines[0].worker.number)
    assert engine is not None
    one.stopped = True
    for _ in range(40):
        engine.tokens += 20
        world.ticks(1)
    assert [type(message) for message in one.link.down] == [Overview]  # one, and no more for ever
    one.stopped = False
    world.ticks(40)
    assert world.simulation.apis()[0] is one
    assert world.told[-1] == world.simulation.supervisor.overview


def test_nothing_is_said_where_nothing_changed(world: World) -> None:
    world.until(lambda: ready(world))
    world.ticks(100)
    before = len(world.told)
    world.ticks(200)
    assert len(world.told) == before


def test_tokens_per_second_are_those_of_the_last_seconds(world: World) -> None:
    world.until(lambda: ready(world))
    engine = world.simulation.engine(world.simulation.supervisor.engines.serving.engines[0].worker.number)
    assert engine is not None
    before = len(world.told)
    seconds = 60
    for _ in range(round(seconds / TICK)):
        engine.tokens += 20
        world.ticks(1)
    rates = [overview.tokens_per_second for overview in world.told[before:]]
    assert max(rates) == pytest.approx(20 / TICK, rel=0.3)
    assert len(rates) <= seconds + 1
    world.ticks(100)
    assert world.told[-1].tokens_per_second == 0


def test_a_worker_that_starts_is_told_at_once(world: World) -> None:
    world.until(lambda: ready(world))
    world.ticks(50)
    first = world.simulation.apis()[0]
    first.die(-9)
    world.until(lambda: ready(world) and world.simulation.apis()[0] is not first and world.told)
    overview = world.until(lambda: next((one for one in world.told if one.workers[0].restarts == 1), None))
    assert overview is not None


def test_without_a_page_nothing_is_told() -> None:
    world = World(**{"http.page": False})
    try:
        world.until(lambda: ready(world))
        world.ticks(50)
        assert world.told == []
    finally:
        world.simulation.close()
