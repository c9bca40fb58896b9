"""What it costs to tell a decode step to the other ranks, and when they have it::

    python tests/bench/ranks.py [--rows 1 32 128 256] [--readers 1 7]

For each number of rows: microseconds that rank 0 spends (its message made and written), and microseconds from before
that until a rank that spins, and one that sleeps, has the decoded step; medians and 99th percentiles. With more readers
only rank 0's time is measured, since they need a core each.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import statistics
import struct
import time

from lightllmd.engine.ranks import commands
from lightllmd.engine.ranks.commands import LaunchStep
from lightllmd.engine.ranks.ring import RingReader, RingWriter
from lightllmd.engine.step import DecodeRows, Step

STEPS = 2000
GAP = 0.0005  # seconds between two steps


def decode_step(rows: int) -> LaunchStep:
    numbers = list(range(rows))
    decode = DecodeRows(numbers, [1000 + row for row in numbers], [100_000 + row for row in numbers], numbers)
    return LaunchStep(Step(1, "decode", decode, [], []))


def told(rows: int, readers: int) -> list[float]:
    """Microseconds of rank 0 for each step; readers are far behind or not there, which costs it nothing."""
    ring, step, taken = RingWriter(readers, 1 << 26), decode_step(rows), []
    for _ in range(STEPS):
        begun = time.perf_counter_ns()
        ring.write(commands.encode(step), full)
        taken.append((time.perf_counter_ns() - begun) / 1000)
    ring.close()
    return taken


def full() -> None:
    raise RuntimeError("the ring is full")


def received(rows: int, spins: bool) -> list[float]:
    """Microseconds until another process has each step."""
    ring, step = RingWriter(1), decode_step(rows)
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(120)
        end = RingReader(os.dup(ring.fd), 1, 0, os.dup(ring.wakes[0]), os.dup(ring.room))
        for _ in range(STEPS):
            while (body := end.take()) is None:
                if not spins and end.sleeps():
                    select.select([end.wake], [], [])
            commands.decode(body)
            os.write(theirs, struct.pack("q", time.perf_counter_ns()))
        os._exit(0)
    begun = []
    for _ in range(STEPS):
        until = time.perf_counter() + GAP
        if spins:
            while time.perf_counter() < until:
                pass
        else:
            time.sleep(GAP)
        begun.append(time.perf_counter_ns())
        ring.write(commands.encode(step), full)
    ends = [struct.unpack("q", os.read(ours, 8))[0] for _ in range(STEPS)]
    os.waitpid(child, 0)
    ring.close()
    return [(end - begin) / 1000 for begin, end in zip(begun, ends, strict=True)][100:]


def line(what: str, taken: list[float]) -> str:
    return f"{what:34}{statistics.median(taken):8.1f}{statistics.quantiles(taken, n=100)[98]:8.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 7])
    given = parser.parse_args()
    print(f"{'microseconds':34}{'median':>8}{'p99':>8}")
    for rows in given.rows:
        print(f"{rows} rows, {len(commands.encode(decode_step(rows)))} bytes")
        for readers in given.readers:
            print(line(f"  rank 0, {readers} others", told(rows, readers)))
        print(line("  until a spinning rank has it", received(rows, spins=True)))
        print(line("  until a sleeping rank has it", received(rows, spins=False)))


if __name__ == "__main__":
    main()
