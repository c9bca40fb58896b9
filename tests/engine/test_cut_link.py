"""Ranks of two hosts whose link is cut in the middle of their steps: both end, and begin anew when it is back."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from engine_process import expected
from harness import wait_for
from lightllmd.errors import EXIT_RANK_GONE
from two_hosts import TwoHosts

PROGRAM = Path(__file__).with_name("rank_of_a_host.py")
LONG = pytest.mark.skipif(os.environ.get("LIGHTLLMD_LONG_TESTS") != "1", reason="the long version")


def steps(log: Path) -> list[int]:
    """Numbers of those that the rank has told of."""
    return [int(line) for line in log.read_text().splitlines() if line.isdigit()] if log.exists() else []


def tokens(log: Path) -> list[int]:
    return [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("token ")]


@pytest.mark.parametrize("kind", ["engine", pytest.param("gloo", marks=LONG)])
def test_a_cut_link_ends_the_ranks_of_both_hosts_within_ten_seconds(kind: str, tmp_path: Path) -> None:
    with TwoHosts() as hosts:

        def start(attempt: int) -> tuple[list[Path], list[object]]:
            logs = [tmp_path / f"{attempt}-{rank}" for rank in (0, 1)]
            words = [[sys.executable, PROGRAM, str(rank), "2", hosts.ADDRESSES[0], "28765", kind] for rank in (0, 1)]
            return logs, [hosts.start(rank, *words[rank], log=logs[rank]) for rank in (1, 0)]

        logs, ranks = start(1)
        wait_for(lambda: all(len(steps(log)) > 20 for log in logs), what="steps on both hosts")
        hosts.cut()
        began = time.monotonic()
        assert [rank.wait(60) for rank in ranks] == [EXIT_RANK_GONE] * 2
        assert time.monotonic() - began < 10
        both = [steps(log) for log in logs]
        assert both[0][: len(both[1])] == both[1][: len(both[0])]  # none was lost or came twice
        made = tokens(logs[0])
        assert made == expected("hello", len(made))
        assert made or kind == "gloo"

        # Ranks that start while the link is down wait for it.
        logs, ranks = start(2)
        time.sleep(1)
        assert [rank.poll() for rank in ranks] == [None, None]
        hosts.mend()
        wait_for(lambda: all(len(steps(log)) > 20 for log in logs), what="steps on both hosts again")
