"""What a candidate finds free on each of several GPUs: that one is full says nothing of the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lightllmd.config.load import load
from lightllmd.config.plan import Facts, Plan
from lightllmd.errors import DoesNotFit
from lightllmd.supervisor.change.placement import Placement
from resolved import MODEL, made
from several_devices import GB, gpus

OLD = {"tp": 2, "max_total_token_num": 2_000_000}


def engine(plan: Plan, *used: int, replica: int = 0, ready: bool = True) -> Any:
    """With so many bytes of each rank's device."""
    children = [SimpleNamespace(stats={"memory_used": each}, memory=0) for each in used]
    return SimpleNamespace(replica=replica, ready=ready, restarts=True, children=children, child=children[0])


def place(flags: dict[str, Any], facts: Any, old: Plan | None, *engines: Any) -> tuple[Plan, bool]:
    serving = SimpleNamespace(plan=old, facts=None, engines=engines)
    known: Any = SimpleNamespace(serving=serving, leaving=[], spares=SimpleNamespace(context_bytes={}))
    placement = Placement(known, load(None, {"model_dir": "m", "supervisor.spare_engine": False, **flags}), None)
    plan, _ = placement.decide(Facts(MODEL, facts))
    return plan, placement.beside


def test_a_candidate_on_two_devices_gets_what_each_rank_gives_back() -> None:
    old = made(OLD, gpus(60, 60))
    first, second = (budget.taken for budget in old.device_budgets)
    busy = gpus(60 - first / GB, 60 - second / GB)
    plan, beside = place(OLD, busy, old, engine(old, first, second))
    assert (plan.ranks, plan.devices, beside) == (2, [0, 1], False)
    with pytest.raises(DoesNotFit):
        place(OLD, busy, old, engine(old, 0, second))
    with pytest.raises(DoesNotFit):
        place(OLD, busy, old, engine(old, first, second, ready=False))


def test_a_candidate_of_one_rank_is_beside_where_its_device_has_room() -> None:
    old = made(OLD, gpus(60, 60))
    small = {"max_total_token_num": 200_000}
    plan, beside = place(small, gpus(30, 1), old, engine(old, 20 * GB, 20 * GB))
    assert (plan.devices, beside, plan.budget.available) == ([0], True, int(30 * GB * 0.9))
    full = gpus(1, 30)
    plan, beside = place(small, full, old, engine(old, 20 * GB, 20 * GB))
    assert (plan.devices, beside, plan.budget.available) == ([0], False, int(21 * GB * 0.9))


def test_replicas_give_back_each_on_its_own_device() -> None:
    flags = {"engine.replicas": 2, "max_total_token_num": 500_000}
    old = made(flags, gpus(60, 60))
    given = [engine(old, 30 * GB, replica=replica) for replica in range(2)]
    plan, beside = place(flags, gpus(1, 5), old, *given)
    assert ([budget.available for budget in plan.device_budgets], beside) == (
        [int(31 * GB * 0.9), int(35 * GB * 0.9)],
        False,
    )
    with pytest.raises(DoesNotFit):
        place(flags, gpus(1, 5), old, given[0])


def test_what_a_starting_rank_has_yet_to_take_is_not_free() -> None:
    old = made(OLD, gpus(60, 60))
    small = {"max_total_token_num": 200_000}
    starting = engine(old, 0, 0, ready=False)
    plan, beside = place(small, gpus(60, 60, 60), old, starting)
    left = 60 * GB - old.device_budgets[0].taken
    assert (plan.devices, beside) == ([0], True)
    assert plan.budget.available == int((left - old.device_budgets[0].spare) * 0.9)
