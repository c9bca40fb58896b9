"""Tensors that lie in files as plain numbers, each whole or in shards: how they are read, a bounded run at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import torch
from torch import Tensor

from lightllmd.architecture.weights import TensorCut
from lightllmd.weights.files import WeightFile
from lightllmd.weights.headers import SAFETENSORS_READABLE, TensorInfo

# Bytes of the file that are read and converted at a time: keeps temporaries small and progress flowing.
CHUNK_BYTES = 16 << 20
FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
assert FLOAT_TYPES.keys() == SAFETENSORS_READABLE
STORED_TYPES = FLOAT_TYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}  # that `PlainCheckpoint.read` takes; only floats are read as another type


@dataclass(frozen=True)
class Run:
    """Bytes of a file that are read at once, and where their elements go."""

    file: str
    offset: int
    nbytes: int
    out: Tensor  # ``[rows, columns]``, a view of the whole tensor
    strides: tuple[int, int]  # of these rows and columns among the elements that were read


class PlainCheckpoint:
    """A `Checkpoint` of such tensors, whatever its files are."""

    readable = SAFETENSORS_READABLE

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors

    def dtype(self, name: str) -> torch.dtype:
        """That a tensor is stored in."""
        return STORED_TYPES[self.tensors[name].type]

    def files(self, name: str) -> list[str]:
        """That a tensor lies in."""
        info = self.tensors[name]
        return [shard.file for shard in info.shards or (info,)]

    def runs(self, name: str, out: Tensor, most: int, cut: TensorCut | None = None) -> Iterator[Run]:
        """What fills `out` (the tensor's shape, or that of what `cut` has of it, contiguous), of `most` bytes each at
        most."""
        info = self.tensors[name]
        item = self.dtype(name).itemsize
        for shard, target, axis, first in _targets(info, out, cut):
            yield from _runs(shard, target, item, max(1, most // item), axis, first)

    def read(self, name: str, out: Tensor, cut: TensorCut | None = None) -> Iterator[int]:
        """As `Checkpoint.read`; what is stored in the dtype of `out` is read into its place."""
        stored = self.dtype(name)
        room = torch.empty(0, dtype=stored)
        for path, runs in groupby(self.runs(name, out, CHUNK_BYTES, cut), attrgetter("file")):
            with WeightFile(path) as file:
                for run in runs:
                    elements = run.nbytes // stored.itemsize
                    as_it_is = stored == out.dtype and run.out.is_contiguous() and elements == run.out.numel()
                    if not as_it_is and len(room) < elements:
                        room = torch.empty(elements, dtype=stored)
                    values = run.out.as_strided((elements,), (1,)) if as_it_is else room[:elements]
                    file.read(run.offset, values.view(torch.uint8).numpy())
                    if not as_it_is:
                        run.out.copy_(values.as_strided(run.out.shape, run.strides))
                    yield run.out.numel() * stored.itemsize


def _targets(info: TensorInfo, out: Tensor, cut: TensorCut | None) -> Iterator[tuple[TensorInfo, Tensor, int, int]]:
    """Of each shard what is wanted of it: where that goes, and its first row (axis 0) or column (axis 1)."""
    begin = 0
    for shard in info.shards or (info,):
        end = begin + shard.shape[info.shard_axis] if info.shards else 0
        if cut is None:
            yield shard, out.narrow(info.shard_axis, begin, end - begin) if info.shards else out, 0, 0
            begin = end
            continue
        at = 0
        for first, behind in cut.runs:
            place, size = at, behind - first
            at += size
            target = out
            if info.shards and info.shard_axis != cut.axis:
                target = out.narrow(info.shard_axis, begin, end - begin)
            elif info.shards:
                place += max(0, begin - first)
                size = min(behind, end) - max(first, begin)
                first = max(0, first - begin)
            if size > 0:
                yield shard, target.narrow(cut.axis, place, size), cut.axis, first
        begin = end


def _runs(info: TensorInfo, out: Tensor, item: int, most: int, axis: int = 0, first: int = 0) -> Iterator[Run]:
    """`item`: bytes of an element; `most`: elements of a run. Of the tensor from row or column `first` on."""
    strides = info.strides
    if not strides and len(info.shape) > 1 and out.shape[1] != info.shape[1]:
        strides = info.shape[1], 1
    offset = info.offset + first * (strides or (math.prod(info.shape[1:]), 1))[axis] * item
    if not strides and out.is_contiguous():
        out = out.view(1, -1)
    columns = out.shape[1]
    down, right = strides or (columns, 1)
    if right != 1:  # stored by columns
        out, down = out.t(), right
        columns = out.shape[1]
    step = 1 + max(0, most - columns) // down
    for row in range(0, len(out), step):
        for column in range(0, columns, most):
            part = out[row : row + step, column : column + most]
            span = (len(part) - 1) * down + part.shape[1]
            yield Run(info.file, offset + (row * down + column) * item, span * item, part, (down, 1))
