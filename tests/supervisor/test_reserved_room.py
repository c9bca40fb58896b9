"""supervisor.swap = "beside" in the simulated world: every swap between named models goes beside, with the same slots
each time, and nobody waits for the room that is kept."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from lightllmd.config.plan import Budget
from lightllmd.supervisor.change.handover import Terms
from lightllmd.supervisor.control.jobs import RunningJob
from lightllmd.supervisor.control.verbs import Caller
from supervisor import simulation
from supervisor.simulated_models import configuration
from supervisor.simulation import DEVICE, Simulation

MODELS = {
    "first": {},
    "second": {"running_max_req_size": 500},
    "third": {"max_total_token_num": 20_000, "max_req_total_len": 2048},
    "missing": {},
}


class World:
    def __init__(self, **flags: Any) -> None:
        auto = {"max_total_token_num": "auto", "running_max_req_size": 1000, "supervisor.swap": "beside"}
        named = {name: {"model_dir": f"/models/{name}", **entry} for name, entry in MODELS.items()}
        config = msgspec.structs.replace(configuration(**auto | flags), models=named)
        self.simulation = Simulation(
            config, readable_others=[f"/models/{name}" for name in MODELS if name != "missing"]
        )
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

    @property
    def slots(self) -> int:
        return self.simulation.supervisor.plan.max_total_token_num

    def swap(self, model: str) -> dict[str, Any]:
        """What its job tells."""
        verbs = self.simulation.supervisor.verbs
        job = self.simulation.ask(lambda: verbs.swap(Caller(), model, Terms()))
        self.pass_time()
        assert isinstance(job, RunningJob)
        assert job.snapshot.outcome == "done", job.snapshot
        return job.snapshot.details

    def said(self, words: str) -> bool:
        return any(words in line.message for line in self.simulation.context.log.last(400))


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(**getattr(request, "param", {}))
    yield made
    made.simulation.close()


@pytest.mark.parametrize("world", [{}, {"engine.memory_fraction": 1.0}], indirect=True, ids=["0.9", "1.0"])
def test_a_model_has_the_same_slots_after_any_swaps_and_all_go_beside(world: World) -> None:
    slots = {"first": world.slots}
    names = [name for name in MODELS if name != "missing"]
    serving = "first"
    for _ in range(9):
        serving = world.order.choice([name for name in names if name != serving])
        details = world.swap(serving)
        assert details["how"] == "beside"
        assert "reserve" in details["plan"]
        assert slots.setdefault(serving, world.slots) == world.slots
        assert world.budget.needed <= world.budget.available
    assert slots["third"] == 20_000
    assert min(slots.values()) > 4096, "more than a longest request"


def test_a_model_that_cant_be_read_is_named_and_hinders_no_start(world: World) -> None:
    assert world.said("room for missing")
    assert world.budget.reserve > 0


def test_a_restart_does_not_wait_for_the_room_that_is_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "DEVICE", DEVICE - world.budget.reserve)
    supervisor = world.simulation.supervisor
    before = supervisor.engines.serving.engines[0].worker.number
    supervisor.engines.serving.engines[0].child.process.send_signal(signal.SIGKILL)
    world.pass_time()
    assert supervisor.state == "serving"
    assert supervisor.engines.serving.engines[0].worker.number == before + 1
    assert not world.said("waiting at most")


def test_where_somebody_else_has_the_room_the_swap_goes_after(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "DEVICE", DEVICE - world.budget.reserve // 2)
    assert world.swap("second")["how"] == "after"
    assert world.budget.reserve > 0
    taken = world.slots
    monkeypatch.undo()
    assert world.swap("first")["how"] == "beside"
    world.swap("second")
    assert world.slots > taken, "the room that came free is divided again"


def test_a_live_change_of_the_setting_leaves_the_memory_divided_as_it_is(world: World) -> None:
    before, settings = world.slots, world.simulation.settings
    changed = msgspec.structs.replace(settings.written.supervisor, swap="auto")
    world.simulation.file = msgspec.structs.replace(settings.written, supervisor=changed, models={})
    world.simulation.ask(lambda: world.simulation.supervisor.verbs.reload(Caller()))
    world.pass_time()
    assert world.simulation.context.config.supervisor.swap == "auto"
    assert world.slots == before
    assert world.budget.reserve > 0
