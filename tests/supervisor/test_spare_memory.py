"""The spare engine's context on a GPU that the plan fills to the last byte, in the simulated world: what it holds is
counted once, and nobody waits for it."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from lightllmd.config.gpu_budget import SPARE_CONTEXT
from lightllmd.config.plan import Budget
from lightllmd.supervisor.change.handover import Terms
from lightllmd.supervisor.control.jobs import RunningJob
from lightllmd.supervisor.control.verbs import Caller
from supervisor.simulated_children import CONTEXT, KEPT_ASLEEP, Engine
from supervisor.simulated_models import configuration
from supervisor.simulation import DEVICE, Simulation


class World:
    """`flags`: of a configuration whose plan takes all that the device has."""

    def __init__(self, **flags: Any) -> None:
        whole = {"engine.memory_fraction": 1.0, "max_total_token_num": "auto", "running_max_req_size": 1000}
        self.simulation = Simulation(configuration(**whole | flags))
        self.order = random.Random(0)
        self.pass_time()
        assert self.simulation.supervisor.state == "serving"

    def pass_time(self) -> None:
        for _ in range(30):
            self.simulation.tick(self.order)
        self.simulation.flush(self.order)
        assert not self.simulation.violations

    @property
    def budget(self) -> Budget:
        return self.simulation.supervisor.plan.budget

    def waiting(self) -> list[Engine]:
        programs = [process.program for process in self.simulation.engines() if process.alive]
        return [program for program in programs if isinstance(program, Engine) and program.configured is None]

    def swap(self) -> Any:
        verbs = self.simulation.supervisor.verbs
        job = self.simulation.ask(lambda: verbs.swap(Caller(), "second", Terms()))
        self.pass_time()
        assert isinstance(job, RunningJob)
        assert job.snapshot.outcome == "done", job.snapshot
        return job.snapshot

    def said(self, words: str) -> bool:
        return any(words in line.message for line in self.simulation.context.log.last(400))


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(**getattr(request, "param", {}))
    yield made
    made.simulation.close()


def test_the_spares_context_is_on_the_device_once_its_engine_serves(world: World) -> None:
    assert world.budget.available == DEVICE
    assert world.budget.available - world.budget.needed < world.budget.row("kv cache")
    assert [spare.memory for spare in world.waiting()] == [CONTEXT]


def test_a_restart_does_not_wait_for_what_its_spare_holds(world: World) -> None:
    supervisor, (spare,) = world.simulation.supervisor, world.waiting()
    for _ in range(2):
        supervisor.engines.serving.engines[0].child.process.send_signal(signal.SIGKILL)
        world.pass_time()
    assert spare.configured is not None
    assert supervisor.state == "serving"
    assert not world.said("waiting at most"), "the device was full but for the spare's own bytes"
    assert [one.memory for one in world.waiting()] == [CONTEXT]


def test_a_spare_costs_a_swap_its_context_and_no_more() -> None:
    taken = {}
    for kept in (True, False):
        world = World(**{"supervisor.spare_engine": kept})
        assert world.swap().details["how"] == "after"
        taken[kept] = world.budget.needed - world.budget.spare
        assert world.budget.spare == (SPARE_CONTEXT if kept else 0)
        assert [one.memory for one in world.waiting()] == ([CONTEXT] if kept else [])
        world.simulation.close()
    slot = 8 * 2 * 8 * 64 * 2
    assert taken[False] == pytest.approx(DEVICE - KEPT_ASLEEP, abs=slot)
    assert taken[False] - taken[True] == pytest.approx(CONTEXT, abs=2 * slot + 0.02 * SPARE_CONTEXT)


@pytest.mark.parametrize("world", [{"supervisor.spare_engine": False}], indirect=True)
def test_a_context_waits_for_an_engine_whose_plan_has_the_bytes(world: World) -> None:
    """Or a reload that asks for a spare would take what the plan in force has given to the KV cache."""
    simulation = world.simulation
    simulation.file = configuration(
        **{"engine.memory_fraction": 1.0, "max_total_token_num": "auto", "running_max_req_size": 1000}
    )
    simulation.ask(lambda: simulation.supervisor.verbs.reload(Caller()))
    world.pass_time()
    assert [one.memory for one in world.waiting()] == [0]
    simulation.supervisor.engines.serving.engines[0].child.process.send_signal(signal.SIGKILL)
    world.pass_time()
    assert [one.memory for one in world.waiting()] == [CONTEXT]
    assert simulation.supervisor.state == "serving"


def test_no_spare_is_made_once_the_daemon_stops(world: World) -> None:
    """An engine may still become ready then, which asks for one."""
    supervisor = world.simulation.supervisor
    spares = supervisor.engines.spares
    spares.end("the daemon stops")
    world.pass_time()
    assert not spares.children()
    spares.plan_for(supervisor.plan)
    spares.keep()
    assert not spares.children()
