"""Weights on their way to a GPU: read from mapped files by several threads, each into a piece of one pinned buffer, and
copied from there into their place while the next pieces are read.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightllmd.weights.layout import Layout, Part, Progress
from lightllmd.weights.safetensors import SafetensorsCheckpoint

PIECE_BYTES = 8 << 20  # a multiple of every item's size; a thread copies it in about a millisecond
THREADS = 8  # at most; more only wait for the memory
SPARE_PIECES = 4  # that are on their way to the device while every thread fills another


@dataclass(frozen=True)
class Piece:
    """A run of a stored tensor's elements, and where they go."""

    part: Part
    begin: int  # bytes within the stored tensor
    nbytes: int
    out: Tensor  # flat, on the device, in the decoder's dtype


def stream(
    checkpoint: SafetensorsCheckpoint, layout: Layout, dtype: torch.dtype, device: torch.device, progress: Progress
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """As `place.stream`, the tensors made on the device, where parts of another dtype are converted too. What is
    yielded may still be on its way: work that the device is given from then on finds it there.
    """
    total = sum(
        checkpoint.tensors[part.name].nbytes for target in layout.targets for part in target.parts + target.bias
    )
    threads = min(THREADS, len(os.sched_getaffinity(0)))
    done = 0
    with (
        MappedFiles(checkpoint) as files,
        Staging(threads + SPARE_PIECES, device) as ring,
        ThreadPoolExecutor(threads) as pool,
    ):
        filling: deque[tuple[Piece, Slot, Future[None]]] = deque()
        waiting: deque[tuple[str, Tensor, Tensor | None, int]] = deque()  # targets, and the number of their last piece
        begun = ended = 0  # pieces

        def upload() -> None:
            nonlocal done, ended
            piece, slot, filled = filling.popleft()
            filled.result()
            slot.upload(piece, checkpoint.dtype(piece.part.name))
            ended += 1
            done += piece.nbytes
            progress(done, total)

        for target in layout.targets:
            weight = _stacked(target.parts, dtype, device)
            bias = _stacked(target.bias, dtype, device) if target.bias else None
            pieces = [*_pieces(checkpoint, target.parts, weight)]
            if bias is not None:
                pieces += _pieces(checkpoint, target.bias, bias)
            for piece in pieces:
                if len(filling) == len(ring):
                    upload()
                slot = ring[begun % len(ring)]
                filling.append((piece, slot, pool.submit(slot.fill, files, piece)))
                begun += 1
            waiting.append((target.key, weight, bias, begun))
            while waiting and waiting[0][3] <= ended:
                yield waiting.popleft()[:3]
        while filling:
            upload()
        for key, weight, bias, _ in waiting:
            yield key, weight, bias


def _stacked(parts: tuple[Part, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), dtype=dtype, device=device)


def _pieces(checkpoint: SafetensorsCheckpoint, parts: tuple[Part, ...], stacked: Tensor) -> Iterator[Piece]:
    flat, at = stacked.view(-1), 0
    for part in parts:
        info = checkpoint.tensors[part.name]
        item = checkpoint.dtype(part.name).itemsize
        for begin in range(0, info.nbytes, PIECE_BYTES):
            nbytes = min(PIECE_BYTES, info.nbytes - begin)
            first = at + begin // item
            yield Piece(part, begin, nbytes, flat[first : first + nbytes // item])
        at += info.elements


class MappedFiles:
    """The checkpoint's files in memory, for as long as the context lasts."""

    def __init__(self, checkpoint: SafetensorsCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._opened: dict[str, tuple[int, np.ndarray]] = {}  # file -> descriptor, its bytes

    def __enter__(self) -> MappedFiles:
        for file in set(self._checkpoint.files.values()):
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
            self._opened[file] = descriptor, np.frombuffer(mapped, np.uint8)
        return self

    def __exit__(self, *failure: object) -> None:
        for descriptor, _ in self._opened.values():
            os.close(descriptor)
        self._opened.clear()

    def read(self, piece: Piece) -> np.ndarray:
        """A view of the stored bytes, which the kernel is asked to fetch in one go."""
        descriptor, stored = self._opened[self._checkpoint.files[piece.part.name]]
        begin = self._checkpoint.tensors[piece.part.name].offset + piece.begin
        os.posix_fadvise(descriptor, begin, piece.nbytes, os.POSIX_FADV_WILLNEED)
        return stored[begin : begin + piece.nbytes]


class Slot:
    """One piece's room in the staging buffer. Filled by one thread at a time, emptied by the device."""

    def __init__(self, room: Tensor, device: torch.device) -> None:
        self._room = room
        self._numbers = room.numpy()
        self._emptied = torch.cuda.Event() if device.type == "cuda" else None

    def fill(self, files: MappedFiles, piece: Piece) -> None:
        """In any thread; waits until the device has taken what was there."""
        if self._emptied is not None:
            self._emptied.synchronize()
        np.copyto(self._numbers[: piece.nbytes], files.read(piece))

    def upload(self, piece: Piece, stored: torch.dtype) -> None:
        values = self._room[: piece.nbytes].view(stored)
        if stored != piece.out.dtype:
            values = values.to(piece.out.device, non_blocking=True)
        piece.out.copy_(values, non_blocking=True)
        if self._emptied is not None:
            self._emptied.record()


class Staging:
    """A host buffer in pieces, pinned where the device is a GPU, for as long as the context lasts."""

    def __init__(self, pieces: int, device: torch.device) -> None:
        self._buffer = torch.empty(pieces * PIECE_BYTES, dtype=torch.uint8)
        self._device = device
        self._pinned = False
        self._slots = [Slot(room, device) for room in self._buffer.split(PIECE_BYTES)]

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
            torch.cuda.synchronize(self._device)
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())
