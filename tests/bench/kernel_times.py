"""Which kernels the device spends its time in, over a chosen window of steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lightllmd.engine.step import Runner, Step

SHOWN = 30  # kernels


class KernelTimes:
    """On a CPU it is operators instead of kernels."""

    def __init__(self, runner: Runner, device: str) -> None:
        self._runner = runner
        self._cuda = device == "cuda"
        self._events: Any = []
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
        steps, total = max(1, self._steps), sum(spent for spent, _, _ in found) or 1
        wall = 1e3 * self._seconds / steps
        lines = [f"{title}: {total / 1e3 / steps:.3f} ms in kernels of {wall:.3f} ms, {self._steps} steps"]
        for spent, calls, name in found[:SHOWN]:
            share, each = spent / total, spent / 1e3 / steps
            lines.append(f"{share:6.1%} {each:9.4f} ms {calls / steps:8.1f} x  {name[:100]}")
        return "\n".join(lines)
