"""Whatever becomes of a new process of the front end, one that serves is not given up for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pytest

from lightllmd.ipc import messages
from lightllmd.supervisor.control.jobs import RunningJob
from supervisor.simulated_children import Fate, SimulatedProcess
from supervisor.test_faults_of_our_own import World
from supervisor.test_supervisor_model import EDITS

FINE = Fate("none", "")
DIES = [Fate("boot", "exit"), Fate("boot", "config"), Fate("boot", "fault"), Fate("boot", "hang")]


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.simulation.close()


def serving(world: World) -> list[SimulatedProcess]:
    return [process for process in world.simulation.apis() if process.program.accepts]  # type: ignore[union-attr]


def reload(world: World, edit: str) -> RunningJob:
    world.simulation.file = EDITS[edit](world.simulation.settings.written)
    job = world.ask("reload", False)
    assert isinstance(job, RunningJob)
    world.until(lambda: job.finished, 2000)
    return job


@pytest.mark.parametrize("edit", ["cors", "port", "fewer workers", "more workers"])
@pytest.mark.parametrize("fate", DIES, ids=lambda fate: fate.what)
def test_a_reload_whose_replacements_die_leaves_every_process_that_serves(edit: str, fate: Fate, world: World) -> None:
    before, listeners = serving(world), list(world.simulation.context.listeners)
    world.simulation.fates["api"] = deque([fate] * 50)
    job = reload(world, edit)
    assert job.snapshot.outcome == "rolled-back", job.snapshot
    assert serving(world) == before
    assert not any(isinstance(message, messages.Retire) for process in before for message in process.ledger)
    assert world.simulation.context.listeners == listeners
    assert [listener.closed for listener in world.simulation.listeners if listener in listeners] == [False]
    assert len(world.supervisor.front.apis) == 2


def test_one_that_was_replaced_before_another_failed_goes_on_where_the_old_settings_bring_up_none(world: World) -> None:
    before = serving(world)
    world.simulation.fates["api"] = deque([FINE, *[Fate("boot", "exit")] * 50])
    job = reload(world, "cors")
    assert job.snapshot.outcome == "failed"
    assert "api-0 goes on with the new settings for now: ended by itself with exit 1" in job.snapshot.message
    world.until(lambda: len(world.simulation.apis()) == 2)
    assert len(serving(world)) == 2
    assert before[1] in serving(world)
    assert world.supervisor.state == "serving"
    world.simulation.fates["api"].clear()
    world.until(lambda: world.supervisor.front.apis[0].outdated is None)
    assert len(serving(world)) == 2


def test_one_that_was_replaced_before_another_failed_is_brought_back_though_the_host_refuses_for_a_while(
    world: World,
) -> None:
    before = serving(world)
    world.simulation.fates["api"] = deque([FINE, *[Fate("boot", "exit")] * 2])
    job = reload(world, "cors")
    assert job.snapshot.outcome == "rolled-back"
    assert before[1] in serving(world)
    assert len(serving(world)) == 2


def test_a_replacement_that_dies_leaves_the_one_that_serves(world: World) -> None:
    before = serving(world)
    world.simulation.fates["api"] = deque([Fate("boot", "exit")])
    job = world.ask("restart", "api-0")
    assert isinstance(job, RunningJob)
    world.until(lambda: job.finished)
    assert job.snapshot.outcome == "failed"
    assert serving(world) == before
    assert world.supervisor.front.apis[0].worker.snapshot().generation == 1
