"""Times of GPU kernels: in CUDA graphs, so that no launch is waited for, as medians of several replays."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# More than any L2 cache: calls of one graph that together read this much find nothing of theirs in it.
BEYOND_CACHE = 256 << 20


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of all calls in their order. Each was called before, so that nothing is compiled while capturing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def median_us(calls: Sequence[Callable[[], object]], repeats: int = 7) -> float:
    """Microseconds of one call: the median time of a graph of all of them over their number."""
    calls[0]()
    calls[-1]()
    torch.cuda.synchronize()
    graph = captured(calls)
    times = []
    for turn in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if turn >= 2:
            times.append(begin.elapsed_time(end))
    return statistics.median(times) * 1e3 / len(calls)


def copies_for(size: int, fewest: int = 2, most: int = 64) -> int:
    """How many buffers of `size` bytes to take turns with, so that none is in the cache when it comes again."""
    return max(fewest, min(most, -(-BEYOND_CACHE // size)))


def require_close(ours: Tensor, truth: Tensor, bound: float) -> None:
    """Relative error in the Frobenius norm; what a kernel left unwritten (poisoned with NaN before) fails."""
    error = float((ours.float() - truth.float()).norm() / truth.float().norm())
    if not error < bound:
        raise ValueError(f"wrong result: relative error {error:.2e}, allowed {bound:.0e}")


class Report:
    """Prints each measurement as it is made, and all as a table at the end."""

    def __init__(self) -> None:
        self.rows: list[dict[str, object]] = []

    def result(self, kernel: str, **fields: object) -> None:
        rounded = {key: round(value, 3) if isinstance(value, float) else value for key, value in fields.items()}
        self.rows.append({"kernel": kernel, **rounded})
        print("RESULT", json.dumps(self.rows[-1]), flush=True)

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """One case's failure is printed and does not keep the others from being measured."""
        try:
            yield
        except Exception as error:
            self.rows.append({"kernel": name, "error": type(error).__name__})
            print("ERROR", name, type(error).__name__, str(error)[:500], flush=True)

    def table(self) -> None:
        for row in self.rows:
            fields = [f"{key}={value}" for key, value in row.items() if key != "kernel"]
            print(f"{row['kernel']!s:<14}", "  ".join(fields))


class Deadline:
    """Ends a section that takes longer than planned: device time is short."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def passed(self, what: str) -> bool:
        if time.monotonic() < self._end:
            return False
        print(f"SKIPPED {what}: the section's time is over", flush=True)
        return True
