"""A GPU's weights in host memory: copied there beside the steps, so that they can leave the device and come back
without their files.

A thread of its own sends pieces over a stream of its own into a pinned ring; others copy them from there into ordinary
memory, which needs no pinning of its own (that takes longer than the copy). The device's copy engine does the work, so
steps lose no more than its share of the memory's bandwidth: on an H100 50 of 3,350 GB/s.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lightllmd.weights.device_facts import free_memory
from lightllmd.weights.loaded import Progress
from lightllmd.weights.staged import PIECE_BYTES, Arrival, Piece, Staging, upload

THREADS = 8  # at most; page faults of fresh memory are what they wait for
SPARE_PIECES = 2
MARGIN = 0.1  # of the free host memory that is left alone
ALIGNMENT = 64  # bytes
TELL = 0.05  # seconds between two signs of progress while something waits


def free_storage(tensors: Mapping[str, Tensor]) -> None:
    """Gives their memory back to the device's allocator. The tensors stay, for `HostCopy.restore` to fill."""
    for tensor in tensors.values():
        if not tensor.untyped_storage().resizable():  # a CPU's, that another library allocated
            tensor.set_(torch.empty_like(tensor).untyped_storage(), 0, tensor.shape, tensor.stride())
        tensor.untyped_storage().resize_(0)


class HostCopy:
    """Begins to copy at once. The tensors must not change meanwhile, and are let go of when it is done.

    All are contiguous, lie on one `device`, and share no memory; of what dtype or scheme they are is the same to it.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        self._device = device
        self._places: dict[str, range] = {}  # where each tensor lies among the copied bytes
        self._size = 0
        for name, tensor in tensors.items():
            self._places[name] = range(self._size, self._size + tensor.nbytes)
            self._size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.total = sum(map(len, self._places.values()))
        self.done = 0  # bytes
        self._cancelled = False
        self._bytes: np.ndarray | None = None  # what was copied; None as long as it isn't whole
        self._beside = ThreadPoolExecutor(1, "stage")
        self._copied: Future[None] = self._beside.submit(self._copy, list(tensors.values()))
        self._beside.shutdown(wait=False)  # nothing more comes

    @property
    def whole(self) -> bool:
        """Everything has been copied."""
        return self._bytes is not None

    @property
    def refused(self) -> bool:
        """Host memory can't hold it."""
        return self._copied.done() and not self.whole and not self._cancelled

    def wait(self, progress: Progress) -> bool:
        """Until it is `whole`, or False: refused. Raises what ended the copying."""
        while not self._copied.done():
            progress(self.done, self.total)
            wait([self._copied], TELL)
        self._beside.shutdown()
        self._copied.result()
        progress(self.done, self.total)
        return self.whole

    def cancel(self) -> None:
        """Copying ends soon; returns when it has."""
        self._cancelled = True
        self._beside.shutdown()

    def restore(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """Fills tensors that have the names and sizes of those that were copied, in place; storage that was freed is
        taken again. Work that the device is given from then on finds the values there. The copy stays."""

        def pieces(tensor: Tensor, begin: int) -> Iterator[Piece]:
            tensor.untyped_storage().resize_(int(tensor.storage_offset()) * tensor.itemsize + tensor.nbytes)
            for at, part in enumerate(_bytes(tensor).split(PIECE_BYTES)):
                yield Piece(partial(self._read, begin + at * PIECE_BYTES), len(part), torch.uint8, part)

        arrivals = (Arrival(name, [*pieces(tensors[name], place.start)]) for name, place in self._places.items())
        for _ in upload(arrivals, self.total, self._device, progress):
            pass

    def _read(self, begin: int, into: np.ndarray) -> None:
        assert self._bytes is not None
        np.copyto(into, self._bytes[begin : begin + len(into)])

    # --- in the thread ---------------------------------------------------------------------------------------------
    def _copy(self, tensors: list[Tensor]) -> None:
        copied = self._room()
        if copied is None:
            return
        on_gpu = self._device.type == "cuda"
        if on_gpu and self._device.index is not None:
            torch.cuda.set_device(self._device)  # of this thread: else it would make a context on the first GPU, too
        # Its priority is the lowest that there is, which is the default one.
        stream = torch.cuda.stream(torch.cuda.Stream(self._device)) if on_gpu else nullcontext()
        threads = min(THREADS, len(os.sched_getaffinity(0)))
        with (
            stream,
            Staging(threads + SPARE_PIECES, self._device, patient=True) as ring,
            ThreadPoolExecutor(threads) as pool,
        ):
            emptying: deque[Future[int]] = deque()
            for number, (source, into) in enumerate(self._pieces(tensors, copied)):
                if self._cancelled:
                    return
                if len(emptying) == len(ring):
                    self.done += emptying.popleft().result()
                slot = ring[number % len(ring)]
                slot.download(source)
                emptying.append(pool.submit(slot.empty, into))
            while emptying:
                self.done += emptying.popleft().result()
        self._bytes = copied

    def _pieces(self, tensors: list[Tensor], copied: np.ndarray) -> Iterator[tuple[Tensor, np.ndarray]]:
        for place, tensor in zip(self._places.values(), tensors, strict=True):
            source, into = _bytes(tensor), copied[place.start : place.stop]
            for begin in range(0, len(place), PIECE_BYTES):
                yield source[begin : begin + PIECE_BYTES], into[begin : begin + PIECE_BYTES]

    def _room(self) -> np.ndarray | None:
        """Memory of its own, which goes back to the system when it is let go of; None where there is too little."""
        if self._size > free_memory() * (1 - MARGIN):
            return None
        try:
            room = mmap.mmap(-1, max(1, self._size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            return None
        try:
            room.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer page faults
        except OSError:
            pass  # a kernel without huge pages
        return np.frombuffer(room, np.uint8)


def _bytes(tensor: Tensor) -> Tensor:
    """A flat view ``[nbytes]`` of a contiguous tensor's bytes."""
    return tensor.view(-1).view(torch.uint8)
