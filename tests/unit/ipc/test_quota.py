"""Limits of API keys in the memory that processes share."""

from __future__ import annotations

import multiprocessing
import os
import random

import pytest

from lightllmd.ipc.quota import Quota

SECOND = 10**9


class Clock:
    def __init__(self) -> None:
        self.now = 10**15

    def __call__(self) -> int:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += int(seconds * SECOND)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quota(clock: Clock):
    made = Quota(clock=clock)
    yield made
    made.close()


def test_a_minutes_worth_may_be_taken_at_once_and_comes_back_evenly(quota: Quota, clock: Clock) -> None:
    assert [quota.take("a", "requests", 1, 6) for _ in range(6)] == [None] * 6
    assert quota.take("a", "requests", 1, 6) == 10.0
    assert quota.left("a", "requests", 6) == (0, 60.0)
    clock.pass_(9)
    assert quota.take("a", "requests", 1, 6) == 1.0
    clock.pass_(1)
    assert quota.take("a", "requests", 1, 6) is None
    clock.pass_(3600)
    assert quota.left("a", "requests", 6) == (6, 0.0)


def test_what_is_overdrawn_comes_in_first(quota: Quota, clock: Clock) -> None:
    quota.charge("a", "tokens", 150, 100)
    assert quota.take("a", "tokens", 0, 100) == 30.0
    clock.pass_(31)
    assert quota.take("a", "tokens", 0, 100) is None
    assert quota.take("a", "tokens", 1, 100) is None
    assert quota.take("a", "tokens", 2, 100) is not None


def test_what_is_given_back_is_there_and_no_more_than_a_minutes_worth(quota: Quota) -> None:
    quota.take("a", "tokens", 80, 100)
    quota.charge("a", "tokens", -80, 100)
    assert quota.left("a", "tokens", 100) == (100, 0.0)
    quota.charge("a", "tokens", -80, 100)
    assert quota.left("a", "tokens", 100) == (100, 0.0)


def test_more_than_the_limit_never_passes(quota: Quota) -> None:
    assert quota.take("a", "tokens", 101, 100) == float("inf")
    assert quota.take("a", "tokens", 100, 100) is None


def test_a_limit_that_changes_keeps_the_share_that_is_used(quota: Quota) -> None:
    quota.take("a", "requests", 30, 60)
    assert quota.left("a", "requests", 10) == (5, 30.0)


def test_keys_and_buckets_are_apart(quota: Quota) -> None:
    quota.take("a", "requests", 10, 10)
    assert quota.left("a", "tokens", 10)[0] == quota.left("b", "requests", 10)[0] == 10


def test_requests_of_a_dead_worker_are_in_flight_no_more(quota: Quota, clock: Clock) -> None:
    other = Quota(os.dup(quota.fd), column=7, clock=clock)
    assert [one.enter("a", 3) for one in (quota, other, other)] == [True] * 3
    assert not quota.enter("a", 3)
    quota.clear(7)
    assert [quota.enter("a", 3) for _ in range(3)] == [True, True, False]
    quota.leave("a")
    assert quota.enter("a", 3)
    other.close()


def _takes(fd: int, start: int, gate: object, taken: object) -> None:
    quota = Quota(os.dup(fd), column=start, clock=lambda: 10**15)
    gate.wait()  # type: ignore[attr-defined]
    mine = 0
    draw = random.Random(start)
    for _ in range(400):
        mine += quota.take("shared", "requests", 1, 500) is None
        if draw.random() < 0.1:
            os.sched_yield()
    taken.put(mine)  # type: ignore[attr-defined]


def test_processes_together_take_exactly_the_limit(quota: Quota) -> None:
    spawning = multiprocessing.get_context("fork")
    gate, taken = spawning.Barrier(3), spawning.Queue()
    workers = [spawning.Process(target=_takes, args=(quota.fd, number, gate, taken)) for number in range(3)]
    for worker in workers:
        worker.start()
    counts = [taken.get(timeout=30) for _ in workers]
    for worker in workers:
        worker.join(30)
    assert sum(counts) == 500
