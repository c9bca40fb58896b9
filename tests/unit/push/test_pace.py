"""When the next push is due."""

from __future__ import annotations

import pytest

from lightllmd.push.pace import LONGEST_WAIT, PushPace


@pytest.mark.parametrize("interval", [0.5, 1, 10, 45, 60, 86400])
@pytest.mark.parametrize("jitter", [0.0, 0.5, 1.0])
def test_the_wait_grows_with_failures_and_stays_between_the_interval_and_its_bound(
    interval: float, jitter: float
) -> None:
    pace = PushPace(interval)
    waits = [pace.wait(jitter)]
    for second in range(2000):
        pace.failed(second)
        waits.append(pace.wait(jitter))
    assert waits[:2] == [interval, interval]
    assert waits == sorted(waits)
    assert max(waits) <= max(interval, LONGEST_WAIT)
    assert waits[-1] >= max(interval, LONGEST_WAIT * 3 / 4)
    pace.succeeded(2000)
    assert pace.wait(jitter) == interval


def test_an_outage_begins_and_ends_once() -> None:
    pace = PushPace(10)
    assert pace.succeeded(0) is None
    assert [pace.failed(at) for at in (100, 110, 130)] == [True, False, False]
    assert pace.succeeded(170) == (3, 70)
    assert pace.succeeded(180) is None
    assert pace.failed(190)
