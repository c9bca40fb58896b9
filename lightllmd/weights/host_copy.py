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
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lightllmd.architecture.weights import WeightSpec
from lightllmd.weights.device_facts import free_memory
from lightllmd.weights.loaded import LoadedWeight, Progress
from lightllmd.weights.staged import PIECE_BYTES, Arrival, Piece, Staging, upload

THREADS = 8  # at most; page faults of fresh memory are what they wait for
SPARE_PIECES = 2
MARGIN = 0.1  # of the free host memory that is left alone
ALIGNMENT = 64  # bytes
TELL = 0.05  # seconds between two signs of progress while something waits


@dataclass(frozen=True)
class Place:
    """Where a tensor lies among the copied bytes."""

    begin: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.shape.numel() * self.dtype.itemsize


class HostCopy:
    """Begins to copy at once. The weights must not change meanwhile, and are let go of when it is done.

    All of `weights` are contiguous tensors of one `device`.
    """

    def __init__(self, weights: Sequence[LoadedWeight], device: torch.device) -> None:
        self._device = device
        self._places: list[tuple[WeightSpec, Place, Place | None]] = []
        end = 0
        for spec, weight, bias in weights:
            places: list[Place | None] = []
            for tensor in (weight, bias):
                places.append(None if tensor is None else Place(end, tensor.shape, tensor.dtype))
                end += 0 if tensor is None else -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            assert places[0] is not None
            self._places.append((spec, places[0], places[1]))
        self._size = end
        self.total = sum(tensor.nbytes for _, *tensors in weights for tensor in tensors if tensor is not None)
        self.done = 0  # bytes
        self._given_up = False
        self._bytes: np.ndarray | None = None  # what was copied; None as long as it isn't whole
        with_tensors = [tensor for _, *tensors in weights for tensor in tensors if tensor is not None]
        self._beside = ThreadPoolExecutor(1, "stage")
        self._copied: Future[None] = self._beside.submit(self._copy, with_tensors)
        self._beside.shutdown(wait=False)  # nothing more comes

    @property
    def whole(self) -> bool:
        """Everything has been copied."""
        return self._bytes is not None

    @property
    def refused(self) -> bool:
        """Host memory can't hold it."""
        return self._copied.done() and not self.whole and not self._given_up

    def wait(self, progress: Progress) -> bool:
        """Until it is `whole`, or False: refused. Raises what ended the copying."""
        while not self._copied.done():
            progress(self.done, self.total)
            wait([self._copied], TELL)
        self._beside.shutdown()
        self._copied.result()
        progress(self.done, self.total)
        return self.whole

    def give_up(self) -> None:
        """Copying ends soon; returns when it has."""
        self._given_up = True
        self._beside.shutdown()

    def stream(self, progress: Progress) -> Iterator[LoadedWeight]:
        """The same weights, on the device anew. As `staged.stream`; the copy stays."""

        def made(place: Place, pieces: list[Piece]) -> Tensor:
            tensor = torch.empty(place.shape, dtype=place.dtype, device=self._device)
            flat, item = tensor.view(-1), place.dtype.itemsize
            for begin in range(0, place.nbytes, PIECE_BYTES):
                end = min(begin + PIECE_BYTES, place.nbytes)
                read = partial(self._read, place.begin + begin)
                pieces.append(Piece(read, end - begin, place.dtype, flat[begin // item : end // item]))
            return tensor

        def arrivals() -> Iterator[Arrival]:
            for spec, weight, bias in self._places:
                pieces: list[Piece] = []
                loaded = LoadedWeight(spec, made(weight, pieces), made(bias, pieces) if bias else None)
                yield Arrival(loaded, pieces)

        return upload(arrivals(), self.total, self._device, progress)

    def _read(self, begin: int, into: np.ndarray) -> None:
        assert self._bytes is not None
        np.copyto(into, self._bytes[begin : begin + len(into)])

    # --- in the thread ---------------------------------------------------------------------------------------------
    def _copy(self, tensors: list[Tensor]) -> None:
        copied = self._room()
        if copied is None:
            return
        on_gpu = self._device.type == "cuda"
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
                if self._given_up:
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
        places = [place for _, *both in self._places for place in both if place is not None]
        for place, tensor in zip(places, tensors, strict=True):
            source = tensor.view(-1).view(torch.uint8)
            into = copied[place.begin : place.begin + place.nbytes]
            for begin in range(0, place.nbytes, PIECE_BYTES):
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
