"""The way of a step's numbers to the device and of its tokens back, without ever waiting for the device.

On a GPU both ways go through pinned memory, in rings of buffers: one is written again only when its copy is done,
which it is long before its turn comes. Other devices (tests) copy at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

DEPTH = 4  # buffers of a ring; more than steps that can be out
SPIN = 0.002  # seconds that a waiter looks at its event without sleeping: a decode step is about as long
NAP = 0.00005  # seconds

Numbers = Sequence[int] | np.ndarray


class Upload:
    """int32 numbers for one step at a time: `begin`, `put` once per array, `send`, then `take` the arrays in order."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._host = [torch.empty(capacity, dtype=torch.int32, pin_memory=self._pinned) for _ in range(DEPTH)]
        self._numbers = [host.numpy() for host in self._host]
        self._copied = [_Event(device) for _ in range(DEPTH)]
        self._device = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._turn = self._end = 0
        self._ends: list[int] = []

    @property
    def device(self) -> Tensor:
        """The whole buffer on the device: its beginning is the last step's numbers."""
        return self._device

    def begin(self) -> None:
        """A new step. Waits until the buffer's last copy is done, which it long is."""
        self._turn = (self._turn + 1) % DEPTH
        self._copied[self._turn].wait(_nothing)
        self._end, self._ends = 0, []

    def put(self, numbers: Numbers) -> None:
        """The step's next array."""
        begin, self._end = self._end, self._end + len(numbers)
        self._numbers[self._turn][begin : self._end] = numbers
        self._ends.append(self._end)

    def send(self) -> list[Tensor]:
        """Views of the device's copies, in the order of `put`. Valid until the next step's launches."""
        host, end = self._host[self._turn], self._end
        self._device[:end].copy_(host[:end], non_blocking=self._pinned)
        self._copied[self._turn].record()
        begins = [0, *self._ends[:-1]]
        return [self._device[begin:end] for begin, end in zip(begins, self._ends, strict=True)]


def pinned(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Numbers of any size, ready to be copied to the device: torch does not reuse their memory before the copies
    that were begun are done. Takes over `numbers`."""
    host = torch.from_numpy(numbers)
    return host.pin_memory() if device.type == "cuda" else host


def send(numbers: np.ndarray, device: torch.device) -> Tensor:
    """As `pinned`, and on the device."""
    return pinned(numbers, device).to(device, non_blocking=True)


class Download:
    """Tensors on their way to the host. Of none: the end of what was launched before."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self._host = [tensor.to("cpu", non_blocking=True) if device.type == "cuda" else tensor for tensor in tensors]
        self._done = _Event(device)
        self._done.record()

    def wait(self, beat: Callable[[], None]) -> list[Tensor]:
        """Calls `beat` now and then."""
        self._done.wait(beat)
        return self._host


class _Event:
    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def record(self) -> None:
        if self._event is not None:
            self._event.record()

    def wait(self, beat: Callable[[], None]) -> None:
        if self._event is None or self._event.query():
            return
        begun = time.monotonic()
        while not self._event.query():
            beat()
            if time.monotonic() - begun > SPIN:
                time.sleep(NAP)
            else:
                os.sched_yield()


def _nothing() -> None:
    pass
