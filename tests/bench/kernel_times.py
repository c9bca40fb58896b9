"""Which kernels the device spends its time in, over a chosen window of steps."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lightllmd.engine.step import Runner, Step

SHOWN = 30  # kernels
# What ranks tell each other: kernels of our own, NCCL's, and on a CPU torch.distributed's.
COMMUNICATION = re.compile(r"^_one_shot|^_two_shot|^_gather$|nccl|gloo|c10d::|all_?gather|all_?reduce", re.IGNORECASE)
LAYERS_OF = range(3, 60)  # kernels that a layer may have


def period(names: list[str]) -> int:
    """After how many kernels the same ones come again, in the middle half of them; 0: they don't."""
    middle = names[len(names) // 4 : -(-3 * len(names) // 4)]
    for length in LAYERS_OF:
        if 3 * length <= len(middle) and middle[length:] == middle[:-length] and len(set(middle[:length])) > 1:
            return length
    return 0


class KernelTimes:
    """On a CPU it is operators instead of kernels."""

    def __init__(self, runner: Runner, device: str) -> None:
        self._runner = runner
        self._cuda = device == "cuda"
        self._events: Any = []
        self._launches: list[tuple[float, float, str]] = []  # begin, end (microseconds) and name, in order of time
        self._steps = 0
        self._seconds = 0.0  # of the whole window, gaps and the profiler's own cost included

    @contextmanager
    def window(self, wanted: Callable[[Step], bool], skip: int, steps: int) -> Iterator[None]:
        """Profiles `steps` wanted steps in a row after `skip` of them; the launches go through here meanwhile."""
        launch = self._runner.launch
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        profiler = profile(activities=activities)
        self._steps, seen, open_now = 0, 0, False

        def profiled(step: Step, beat: Callable[[], None], *masks: Any) -> None:
            nonlocal seen, open_now
            if wanted(step):
                if seen == skip:
                    self._settle()
                    profiler.start()
                    self._seconds, open_now = -time.perf_counter(), True
                seen += 1
                self._steps += open_now
            launch(step, beat, *masks)
            if open_now and self._steps == steps:
                self._settle()
                self._seconds += time.perf_counter()
                profiler.stop()
                open_now = False

        self._runner.launch = profiled
        try:
            yield
        finally:
            self._runner.launch = launch
            if open_now:
                profiler.stop()
        self._events = profiler.key_averages() if self._steps else []
        self._launches = sorted(
            (event.time_range.start, event.time_range.end, event.name)
            for event in (profiler.events() if self._steps and self._cuda else [])
            if event.device_type == DeviceType.CUDA
        )

    def _settle(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def table(self, title: str) -> str:
        """Share, milliseconds per step, calls per step and name of each, the longest first."""
        if self._cuda:
            found = [
                (event.self_device_time_total, event.count, event.key)
                for event in self._events
                if event.device_type == DeviceType.CUDA
            ]
        else:
            found = [(event.self_cpu_time_total, event.count, event.key) for event in self._events]
        found.sort(reverse=True)
        told = [(spent, count) for spent, count, name in found if COMMUNICATION.search(name)]
        steps, total = max(1, self._steps), sum(spent for spent, _, _ in found) or 1
        wall = 1e3 * self._seconds / steps
        lines = [f"{title}: {total / 1e3 / steps:.3f} ms in kernels of {wall:.3f} ms, {self._steps} steps"]
        if told:
            spent, calls = (sum(column) for column in zip(*told, strict=True))
            each = spent / 1e3 / steps
            lines.append(f"communication: {each:.3f} ms, {spent / total:.1%} of it, {calls / steps:.1f} launches")
        for spent, calls, name in found[:SHOWN]:
            share, each = spent / total, spent / 1e3 / steps
            lines.append(f"{share:6.1%} {each:9.4f} ms {calls / steps:8.1f} x  {name[:100]}")
        return "\n".join(lines)

    def layer(self) -> str:
        """The kernels of one layer in order: when each begins, how long it takes, how long after the one before it
        ends; medians over the middle layers of a step. Then communication's share of the layer's time."""
        launches = self._launches[: len(self._launches) // max(1, self._steps)]
        length = period([name for _, _, name in launches])
        if not length:
            return "no layers are told apart"
        first = len(launches) // 4
        layers = [launches[at : at + length + 1] for at in range(first, 3 * len(launches) // 4 - length, length)]
        whole = statistics.median(layer[length][0] - layer[0][0] for layer in layers)
        lines, communication = [f"a layer, median of {len(layers)}: {whole:.1f} us"], 0.0
        for at in range(length):
            begin = statistics.median(layer[at][0] - layer[0][0] for layer in layers)
            taken = statistics.median(layer[at][1] - layer[at][0] for layer in layers)
            # A kernel that was launched early waits for the one before it: its own time begins at that one's end.
            ends = [(layer[at - 1][1] if at else layer[0][0], layer[at][1]) for layer in layers]
            own = statistics.median(end - before for before, end in ends)
            name = layers[0][at][2]
            communication += own if COMMUNICATION.search(name) else 0.0
            lines.append(f"{begin:9.1f} us  {taken:8.1f} us  {own:8.1f} us behind the one before  {name[:90]}")
        return "\n".join([*lines, f"communication: {communication:.1f} us, {communication / whole:.1%} of the layer"])
