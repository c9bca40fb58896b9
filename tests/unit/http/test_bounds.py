"""How many connections the descriptors allow, and what contradicts itself."""

from __future__ import annotations

import resource

import pytest

from lightllmd.config.parameters import Config, HttpSettings
from lightllmd.config.rules import contradictions
from lightllmd.http import bounds


@pytest.mark.parametrize(
    ("soft", "wanted", "found"), [(128, 16384, 68), (128, 40, 40), (32, 16384, 8), (1 << 20, 100, 100)]
)
def test_connections_leave_descriptors_for_health_and_files(monkeypatch, soft, wanted, found):
    monkeypatch.setattr(bounds.resource, "getrlimit", lambda _: (soft, soft))
    monkeypatch.setattr(bounds.os, "listdir", lambda _: ["0"] * 20)
    assert bounds.descriptors_left(wanted) == found


def test_the_soft_limit_on_descriptors_is_raised_as_far_as_the_hard_one_allows(monkeypatch):
    limits = {"now": (1024, 4096)}
    monkeypatch.setattr(bounds.resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(bounds.resource, "setrlimit", lambda _, both: limits.update(now=both))
    bounds.raise_descriptor_limit()
    assert limits["now"] == (4096, 4096)
    limits["now"] = (1024, resource.RLIM_INFINITY)
    bounds.raise_descriptor_limit()
    assert limits["now"] == (65536, resource.RLIM_INFINITY)


def test_memory_for_bodies_holds_more_than_one():
    def told(memory: int) -> list[str]:
        http = HttpSettings(max_body_bytes=1 << 20, max_body_bytes_in_flight=memory)
        return [message for _, message in contradictions(Config(http=http), set())]

    assert told(2 << 20) == []
    assert told((2 << 20) - 1) == ["max_body_bytes_in_flight = 2097151 must be at least twice max_body_bytes = 1048576"]
