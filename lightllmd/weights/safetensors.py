"""Checkpoints in safetensors files, one or many."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightllmd.errors import WeightsInvalid
from lightllmd.weights.files import WeightFile
from lightllmd.weights.headers import SAFETENSORS_READABLE, TensorInfo, read_safetensors_header

# Bytes of the file that are read and converted at a time: keeps temporaries small and progress flowing.
CHUNK_BYTES = 16 << 20
FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
assert FLOAT_TYPES.keys() == SAFETENSORS_READABLE


class SafetensorsCheckpoint:
    """Raises WeightsInvalid for damaged, truncated or missing files and for a tensor that is in two of them."""

    readable = SAFETENSORS_READABLE

    def __init__(self, files: Sequence[str | os.PathLike[str]]) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        for file in files:
            for tensor in read_safetensors_header(file).tensors:
                if tensor.name in self.tensors:
                    raise WeightsInvalid(f"tensor {tensor.name} is in {file} and in another file before it")
                self.tensors[tensor.name] = tensor

    def dtype(self, name: str) -> torch.dtype:
        """That a tensor is stored in."""
        return FLOAT_TYPES[self.tensors[name].type]

    def read(self, name: str, out: Tensor) -> Iterator[int]:
        """As `Checkpoint.read`; what is stored in the dtype of `out` is read into its place."""
        stored, info = self.dtype(name), self.tensors[name]
        rows = info.shape[0]
        row_bytes = info.nbytes // max(1, rows)
        step = max(1, CHUNK_BYTES // max(1, row_bytes))
        as_it_is = stored == out.dtype and out.is_contiguous()
        room = out if as_it_is else torch.empty((min(step, rows), *info.shape[1:]), dtype=stored)
        with WeightFile(info.file) as file:
            for first in range(0, rows, step):
                target = out[first : first + step]
                values = target if as_it_is else room[: len(target)]
                file.read(info.offset + first * row_bytes, values.view(-1).view(torch.uint8).numpy())
                if not as_it_is:
                    target.copy_(values)
                yield values.nbytes
