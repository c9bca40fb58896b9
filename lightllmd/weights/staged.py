"""Weights on their way to a GPU: read by several threads, each into a piece of one pinned buffer, and copied from there
into their place while the next pieces are read.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightllmd.architecture.weight_schemes import ALL_DENSE, WeightSchemes
from lightllmd.architecture.weights import WeightSpec
from lightllmd.weights.arriving import ArrivingWeight, Loading, Target, source_bytes, sources
from lightllmd.weights.files import WeightFile
from lightllmd.weights.loaded import LoadedWeight, Progress
from lightllmd.weights.plain import PlainCheckpoint
from lightllmd.weights.quantised.stored import Matrices

PIECE_BYTES = 8 << 20  # a multiple of every item's size; a thread copies it in about a millisecond
THREADS = 8  # at most; more only wait for the memory
SPARE_PIECES = 4  # that are on their way to the device while every thread fills another


Whole = TypeVar("Whole")


@dataclass(frozen=True)
class Piece:
    """A run of a tensor's elements, and where they go."""

    read: Callable[[np.ndarray], None]  # fills bytes, in any thread
    nbytes: int
    stored: torch.dtype
    out: Tensor  # on the device, in the decoder's dtype
    strides: tuple[int, ...] = (1,)  # of `out`'s elements among those that are read

    @property
    def stored_bytes(self) -> int:
        """Of the elements themselves: gaps between them are read too."""
        return self.out.numel() * self.stored.itemsize


@dataclass(frozen=True)
class Arrival(Generic[Whole]):
    """What has come when all of its pieces have."""

    whole: Whole
    pieces: list[Piece]


def stream(
    checkpoint: PlainCheckpoint,
    weights: Sequence[WeightSpec],
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
    passing: Sequence[WeightSpec] = (),
    matrices: Matrices | None = None,
    schemes: WeightSchemes = ALL_DENSE,
) -> Iterator[LoadedWeight]:
    """As `place.stream`, the tensors made on the device, where parts of another dtype are converted too. What is
    yielded may still be on its way: work that the device is given from then on finds it there.
    """
    how = Loading(dtype, device, passing, matrices or {}, schemes)
    needed = [sources(weight, how.matrices) for weight in weights]
    files = _OpenFiles([[file for name in names for file in checkpoint.files(name)] for names in needed])

    def arrivals() -> Iterator[Arrival[ArrivingWeight]]:
        rooms = how.rooms  # what passes has been taken before a piece of the next is sent
        for weight in weights:
            arriving = ArrivingWeight(weight, how, rooms)
            pieces = [piece for target in arriving.targets for piece in _pieces(checkpoint, files, target)]
            yield Arrival(arriving, pieces)

    total = sum(source_bytes(weight, checkpoint.tensors, how.matrices) for weight in weights)
    # What is uploaded ends before the files that it reads are closed.
    with closing(files), closing(upload(arrivals(), total, device, progress)) as arrived:
        for number, arriving in enumerate(arrived):
            files.close_read(number)
            yield arriving.whole()
            del arriving


class _OpenFiles:
    """The files of a checkpoint, each open from the first weight that lies in it to the last: there may be more than a
    process may have open."""

    def __init__(self, uses: Sequence[Sequence[str]]) -> None:
        self._last = {path: number for number, paths in enumerate(uses) for path in paths}
        self._open: dict[str, WeightFile] = {}

    def __getitem__(self, path: str) -> WeightFile:
        if path not in self._open:
            self._open[path] = WeightFile(path)
        return self._open[path]

    def close_read(self, number: int) -> None:
        """All that the weights up to `number` needed has been read."""
        for path in [path for path in self._open if self._last[path] <= number]:
            self._open.pop(path).close()

    def close(self) -> None:
        """All of them."""
        while self._open:
            self._open.popitem()[1].close()


def upload(
    arrivals: Iterable[Arrival[Whole]], total: int, device: torch.device, progress: Progress
) -> Generator[Whole, None, None]:
    """Yields them in their order, each before a piece of the next is sent. `total` bytes have been read when the last
    has come."""
    threads = min(THREADS, len(os.sched_getaffinity(0)))
    done = 0
    with Staging(threads + SPARE_PIECES, device) as ring, ThreadPoolExecutor(threads) as pool:
        filling: deque[tuple[Piece, Slot, Future[None]]] = deque()
        waiting: deque[tuple[Whole, int]] = deque()  # and the number of its last piece
        begun = ended = 0  # pieces

        def send() -> Iterator[Whole]:
            nonlocal done, ended
            piece, slot, filled = filling.popleft()
            filled.result()
            slot.upload(piece)
            ended += 1
            done += piece.stored_bytes
            progress(done, total)
            yield from arrived()

        def arrived() -> Iterator[Whole]:
            while waiting and waiting[0][1] <= ended:
                yield waiting.popleft()[0]

        for arrival in arrivals:
            last = begun + len(arrival.pieces)
            waiting.append((arrival.whole, last))
            for piece in arrival.pieces:
                if len(filling) == len(ring):
                    yield from send()
                slot = ring[begun % len(ring)]
                filling.append((piece, slot, pool.submit(slot.fill, piece)))
                begun += 1
            yield from arrived()
        while filling:
            yield from send()


def _pieces(checkpoint: PlainCheckpoint, files: _OpenFiles, target: Target) -> Iterator[Piece]:
    stored = checkpoint.dtype(target.name)
    for run in checkpoint.runs(target.name, target.out, PIECE_BYTES, target.cut):
        yield Piece(partial(files[run.file].read, run.offset), run.nbytes, stored, run.out, run.strides)


class Slot:
    """One piece's room in the staging buffer, on one side of which is the device and on the other a thread."""

    def __init__(self, room: Tensor, device: torch.device, patient: bool) -> None:
        self._room = room
        self._numbers = room.numpy()
        self._copied = torch.cuda.Event(blocking=patient) if device.type == "cuda" else None

    def _wait(self) -> None:
        """Until the device has taken, or brought, what is here."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copying(self) -> None:
        if self._copied is not None:
            self._copied.record()

    def fill(self, piece: Piece) -> None:
        """In any thread."""
        self._wait()
        piece.read(self._numbers[: piece.nbytes])

    def upload(self, piece: Piece) -> None:
        """Sends what `fill` read to its place; gaps are left out and numbers converted to the decoder's dtype there."""
        values = self._room[: piece.nbytes].view(piece.stored)
        if piece.stored != piece.out.dtype or piece.nbytes != piece.stored_bytes:
            values = values.to(piece.out.device, non_blocking=True)
        piece.out.copy_(values.as_strided(piece.out.shape, piece.strides), non_blocking=True)
        self._copying()

    def download(self, source: Tensor) -> None:
        """`source`: bytes on the device."""
        self._room[: len(source)].copy_(source, non_blocking=True)
        self._copying()

    def empty(self, into: np.ndarray) -> int:
        """In any thread. Returns how many bytes it was."""
        self._wait()
        np.copyto(into, self._numbers[: len(into)])
        return len(into)


class Staging:
    """A host buffer in pieces, pinned where the device is a GPU, for as long as the context lasts. All copies to or
    from the device belong to the stream that is current when it ends.

    `patient`: threads that wait for the device sleep instead of spinning, which answers some microseconds later.
    """

    def __init__(self, pieces: int, device: torch.device, patient: bool = False) -> None:
        self._buffer = torch.empty(pieces * PIECE_BYTES, dtype=torch.uint8)
        self._device = device
        self._pinned = False
        self._slots = [Slot(room, device, patient) for room in self._buffer.split(PIECE_BYTES)]

    def __enter__(self) -> list[Slot]:
        if self._device.type == "cuda":
            # Registered by ourselves, because torch's allocator of pinned memory keeps for ever what it once had. A
            # refusal makes the copies slower, not wrong.
            torch.cuda.init()
            code = torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), self._buffer.nbytes, 0)
            self._pinned = int(code) == 0
        return self._slots

    def __exit__(self, *failure: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
