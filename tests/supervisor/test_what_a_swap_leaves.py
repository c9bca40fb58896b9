"""What an operator is told of the model that is served, and what a change of it leaves as it was."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import msgspec
import pytest

from lightllmd.supervisor.change.handover import Terms
from lightllmd.supervisor.control import status
from lightllmd.supervisor.control.jobs import RunningJob
from lightllmd.supervisor.snapshot import JobStatus
from supervisor.test_faults_of_our_own import World
from supervisor.test_supervisor_model import EDITS


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.simulation.close()


def done(world: World, verb: str, *arguments: object) -> JobStatus:
    job = world.ask(verb, *arguments)
    assert isinstance(job, RunningJob), job
    world.until(lambda: job.finished)
    assert job.snapshot.outcome == "done", job.snapshot
    return job.snapshot


@pytest.mark.parametrize("model", ["first", "/models/first"])
@pytest.mark.parametrize("plan_only", [False, True])
def test_a_swap_to_the_model_in_force_says_so_and_restarts_nothing(model: str, plan_only: bool, world: World) -> None:
    if model.startswith("/"):
        done(world, "swap", model, Terms())  # under the name that the path gives it
    before = world.supervisor.engines.serving, world.supervisor.engines.serving.engines[0].child
    message = done(world, "swap", model, Terms(), plan_only).message
    assert message == "first is in force already; nothing was done"
    assert (world.supervisor.engines.serving, world.supervisor.engines.serving.engines[0].child) == before


def test_a_swap_to_the_model_in_force_starts_it_where_it_was_given_up(world: World) -> None:
    worker = world.supervisor.engines.serving.engines[0].worker
    worker.limited = True
    assert "is in force, " in done(world, "swap", "first", Terms()).message
    assert world.supervisor.engines.serving.engines[0].worker is not worker


def test_a_swap_says_what_a_restart_of_the_daemon_serves_and_the_status_does_too(world: World) -> None:
    message = done(world, "swap", "second", Terms()).message
    assert message.endswith("; when the daemon starts anew it serves first, as its configuration says")
    assert status.build(world.supervisor).config.swapped_to == "second"
    done(world, "reload", False)
    assert status.build(world.supervisor).config.swapped_to == "second"
    assert "starts anew" not in done(world, "swap", "first", Terms()).message
    assert status.build(world.supervisor).config.swapped_to is None


def test_the_model_at_the_top_and_an_entry_of_the_same_files_are_swapped_between(world: World) -> None:
    written = world.simulation.settings.written
    entry = {"model_dir": written.params.model_dir, "mode": ["triton_w8a16"]}
    world.simulation.file = msgspec.structs.replace(written, models={**written.models, "eight": entry})
    before = world.supervisor.engines.serving
    done(world, "reload", False)
    assert world.supervisor.engines.serving is before, "the top is served as it was"
    modes = []
    for model in ("eight", written.params.model_dir):
        done(world, "swap", model, Terms())
        modes.append(world.supervisor.context.config.params.mode)
    assert modes == [["triton_w8a16"], []]
    assert status.build(world.supervisor).config.swapped_to is None


def test_restarts_are_counted_over_reloads_and_swaps(world: World) -> None:
    world.supervisor.engines.serving.engines[0].child.process.send_signal(signal.SIGKILL)
    world.until(
        lambda: world.supervisor.state == "serving" and world.supervisor.engines.serving.engines[0].worker.restarts == 1
    )
    world.simulation.file = EDITS["engine"](world.simulation.settings.written)
    done(world, "reload", False)
    done(world, "swap", "second", Terms())
    shown = status.build(world.supervisor)
    (engine,) = [worker for worker in shown.workers if worker.name == "engine-0"]
    assert (engine.restarts, shown.restarts) == (1, 1)
    assert engine.last_exit is not None
    assert engine.last_exit.cause == "killed by SIGKILL"
