"""Routing by cached prefix is worth what RESULTS.md says, by the simulation that is told there, made small."""

from __future__ import annotations

import pytest

from bench.routing_simulation import POLICIES, Result, Scene, simulate

SMALL = Scene(replicas=40, requests=3000, rate=2.0, routers=2)


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    return {policy: simulate(SMALL, policy) for policy in POLICIES}


def test_affinity_finds_half_as_much_again_in_the_caches(results: dict[str, Result]) -> None:
    others = [one.hit_rate for policy, one in results.items() if policy != "affinity"]
    assert results["affinity"].hit_rate > 1.5 * max(others)


def test_first_tokens_come_sooner_in_the_middle_and_at_the_end(results: dict[str, Result]) -> None:
    for policy, other in results.items():
        if policy != "affinity":
            assert results["affinity"].p50 < 0.6 * other.p50, policy
            assert results["affinity"].p99 < 0.8 * other.p99, policy


def test_no_replica_is_overrun_for_the_sake_of_its_cache(results: dict[str, Result]) -> None:
    assert results["affinity"].waits <= min(one.waits for one in results.values()) + 0.001
    assert results["affinity"].busy < results["round robin"].busy


def test_a_run_repeats(results: dict[str, Result]) -> None:
    assert simulate(SMALL, "random") == results["random"]
