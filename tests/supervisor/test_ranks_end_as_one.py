"""The ranks of a generation end as one: at once, by the cause of the first, with one report and one failure.

In the simulated world, where nothing happens between two ticks but what follows from what was done: what is said to
come at once comes without any time passing.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from lightllmd.errors import EXIT_CONFIG, EXIT_RANK_GONE
from lightllmd.ipc.messages import EngineDown, Failed, Heartbeat
from lightllmd.supervisor.children import child as children
from lightllmd.supervisor.control import status
from lightllmd.supervisor.control.verbs import Caller
from supervisor.simulated_children import SimulatedProcess
from supervisor.simulated_models import configuration
from supervisor.simulation import Simulation

TP = 3


class Group(Simulation):
    """It serves with three ranks."""

    def __init__(self) -> None:
        super().__init__(configuration(**{"tp": TP, "http.workers": 1}))
        self.order = random.Random(0)
        self.until(lambda: self.supervisor.state == "serving")

    def until(self, condition: Callable[[], object], most: int = 200) -> None:
        for _ in range(most):
            if condition():
                return
            self.tick(self.order)
        raise AssertionError(f"{self.context.events.feed.last(10)}")

    def at_once(self) -> None:
        """All that follows without time."""
        self.flush(self.order)

    @property
    def engine(self) -> Any:
        return self.supervisor.engines.serving.engines[0]

    @property
    def group(self) -> list[SimulatedProcess]:
        return [child.process for child in self.engine.children]

    def downs(self) -> list[EngineDown]:
        return [message for message in self.apis()[0].ledger if isinstance(message, EngineDown)]

    def reports(self) -> list[tuple[str, str]]:
        return [(crash.worker, crash.cause) for crash in self.supervisor.crashes.all()]


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group()
    yield made
    assert not made.violations
    made.close()


@pytest.mark.parametrize("rank", range(TP))
@pytest.mark.parametrize(
    ("number", "outside"), [(signal.SIGKILL, True), (signal.SIGSEGV, False)], ids=["SIGKILL", "SIGSEGV"]
)
def test_a_death_is_told_and_the_others_are_killed_at_once(
    group: Group, rank: int, number: signal.Signals, outside: bool
) -> None:
    before = group.group
    before[rank].die(-number)
    group.at_once()
    assert [process.code for process in before] == [-number if process is before[rank] else -9 for process in before]
    if before[rank].returncode is None:  # the kernel takes it down, and its exit code is not known before
        assert status.health(group.supervisor) == (False, "the engine is dying")
        group.until(lambda: before[rank].returncode is not None)
        group.at_once()
    cause = f"rank {rank} (pid {before[rank].pid}): killed by {number.name}"
    assert [(down.cause, down.outside) for down in group.downs()] == [(cause, outside)]
    group.until(lambda: group.supervisor.state == "serving")
    assert group.reports() == [(f"engine-0{f'.{rank}' if rank else ''}", cause)], (
        "none of those that were killed for it"
    )
    worker = group.engine.worker
    assert (worker.restarts, worker.last_exit.cause) == (1, cause)
    assert not set(group.group) & set(before)
    assert not [process for process in before if process.returncode is None]


@pytest.mark.parametrize("how", ["stopped", "hung"])
def test_the_rank_that_hangs_is_named_and_the_others_do_not_wait_for_its_stacks(group: Group, how: str) -> None:
    before = group.group
    setattr(before[1], how, True)
    for process in (before[0], before[2]):  # they stand still, and say so
        process.program.beat = partial(process.say, Heartbeat("ready", 7, True, 100, {}))
    group.until(group.downs)
    (down,) = group.downs()
    assert down.cause.startswith(f"rank 1 (pid {before[1].pid}): hung: ")
    assert down.outside == (how == "stopped")
    assert before[0].code == before[2].code == -signal.SIGKILL
    assert not (before[0].killed and before[1].killed), "it was sent SIGABRT, they SIGKILL"
    group.until(lambda: group.supervisor.state == "serving")
    ((worker, cause),) = group.reports()
    assert worker == "engine-0.1"
    assert cause.removeprefix(down.cause) == f"; ended by {'SIGKILL' if how == 'stopped' else 'SIGABRT'}"


def test_of_several_that_end_together_the_echo_is_not_named(group: Group) -> None:
    """The kernel takes a while to take a GPU's process down; who misses it may be gone before."""
    before = group.group
    group.duration = lambda: 5  # type: ignore[method-assign]
    before[2].die(-signal.SIGKILL)
    before[0].memory = before[0].program.memory = 0
    before[0].say(Failed("rank", "another rank is gone"))
    before[0].die(EXIT_RANK_GONE)
    group.at_once()
    assert (before[0].returncode, before[2].returncode) == (EXIT_RANK_GONE, None)
    assert not group.downs(), "what ended the other is not known yet"
    group.until(group.downs)
    assert group.downs()[0].cause == f"rank 2 (pid {before[2].pid}): killed by SIGKILL"
    del group.duration
    group.until(lambda: group.supervisor.state == "serving")
    assert len(group.reports()) == 1


def test_what_the_first_rank_says_counts_not_what_its_end_makes_of_the_others(group: Group) -> None:
    before = group.group
    before[1].say(Failed("error", "CUDA error: an illegal memory access was encountered"))
    group.at_once()
    assert [process.killed for process in before] == [True, False, True], "at its word, before it is dead"
    before[1].die(1)
    group.until(group.downs)
    told = group.downs()[0].cause
    assert told == f"rank 1 (pid {before[1].pid}): CUDA error: an illegal memory access was encountered"
    group.until(lambda: group.supervisor.state == "serving")


def test_a_rank_that_can_never_run_stops_the_restarts(group: Group) -> None:
    before = group.group
    before[1].die(EXIT_CONFIG)
    group.until(group.downs)
    group.until(lambda: group.engine.generation is None)
    assert group.engine.worker.fatal is not None
    assert group.engine.worker.fatal.cause.startswith("rank 1 (pid ")
    assert group.supervisor.state == "degraded"
    group.ask(lambda: group.supervisor.verbs.reset_failed(Caller()))
    group.until(lambda: group.supervisor.state == "serving")


def test_a_host_without_a_process_for_each_rank_has_a_failed_start_and_nothing_left(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    group.ask(lambda: group.supervisor.verbs.restart(Caller(), "engine"))
    spawn, left = group._spawn, [1]

    def one_only(command: list[str], **options: object) -> SimulatedProcess:
        if command[0] == "engine":
            if not left:
                group.refuse_spawns = 1
            else:
                left.pop()
        return spawn(command, **options)

    group.supervisor.engines.spares._early = ()  # it takes none, and keeps none
    group.supervisor.engines.spares.take = lambda plan, device: None
    monkeypatch.setattr(children, "Process", one_only)
    group.until(lambda: group.engine.worker.failures)
    assert "as ordered" in group.engine.worker.last_exit.cause
    left.extend([1] * 20)
    group.until(lambda: group.supervisor.state == "serving")
    assert len(group.group) == TP


def test_a_spare_waits_for_each_rank_on_its_device_and_they_are_taken_together(group: Group) -> None:
    spares = group.supervisor.engines.spares
    group.until(lambda: len(spares.children()) == TP and all(begun for _, begun in spares.holders))
    kept = {process.device: process.child.process for process in spares._processes}
    assert sorted(kept) == list(range(TP))
    assert [child.worker for child in spares.children()] == ["spare", "spare.1", "spare.2"]
    group.group[1].die(-signal.SIGKILL)
    group.until(lambda: group.supervisor.state == "serving" and group.engine.worker.restarts)
    assert {process.device: process.child.process for process in group.engine.generation.ranks} == kept


def test_the_status_shows_each_rank(group: Group) -> None:
    shown = [worker for worker in status.workers(group.supervisor) if worker.kind == "engine"]
    assert [(worker.name, worker.rank, worker.index) for worker in shown] == [
        ("engine-0", 0, 0),
        ("engine-0.1", 1, 0),
        ("engine-0.2", 2, 0),
    ]
    assert [worker.pid for worker in shown] == [process.pid for process in group.group]
    assert all(worker.phase == "ready" and worker.heartbeat_age_s is not None for worker in shown)
    group.group[2].die(-signal.SIGKILL)
    group.until(lambda: group.supervisor.state == "serving" and group.engine.worker.restarts)
    assert status.build(group.supervisor).restarts == 1, "a generation's restart counts once"


def test_a_rank_is_restarted_by_its_name_with_all_others(group: Group) -> None:
    before = group.group
    job = group.ask(lambda: group.supervisor.verbs.restart(Caller(), "engine-0.2"))
    group.until(lambda: job.finished)
    assert job.snapshot.outcome == "done"
    assert not set(group.group) & set(before)
    assert not group.reports()
