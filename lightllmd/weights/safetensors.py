"""Checkpoints in safetensors files, one or many."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightllmd.errors import WeightsInvalid
from lightllmd.weights.files import WeightFile
from lightllmd.weights.headers import TensorInfo, read_safetensors_header
from lightllmd.weights.index import CHUNK_BYTES

FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsCheckpoint:
    """Raises WeightsInvalid for damaged, truncated or missing files and for a tensor that is in two of them."""

    def __init__(self, files: Sequence[str | os.PathLike[str]]) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self.files: dict[str, str] = {}  # of each tensor
        for file in files:
            try:
                header = read_safetensors_header(file)
            except OSError as error:
                raise WeightsInvalid(f"{file}: can't be read: {error.strerror}") from None
            for tensor in header.tensors:
                if tensor.name in self.tensors:
                    raise WeightsInvalid(f"tensor {tensor.name} is in {file} and in another file before it")
                self.tensors[tensor.name] = tensor
                self.files[tensor.name] = os.fspath(file)

    def dtype(self, name: str) -> torch.dtype:
        """Raises WeightsInvalid where it is none for a weight."""
        kind = self.tensors[name].type
        if kind not in FLOAT_TYPES:
            known = ", ".join(sorted(FLOAT_TYPES))
            raise WeightsInvalid(f"tensor {name} is of type {kind}, which is not available yet ({known} are)")
        return FLOAT_TYPES[kind]

    def read(self, name: str, out: Tensor) -> Iterator[int]:
        stored, info = self.dtype(name), self.tensors[name]
        rows = info.shape[0]
        row_bytes = info.nbytes // max(1, rows)
        step = max(1, CHUNK_BYTES // max(1, row_bytes))
        as_it_is = stored == out.dtype and out.is_contiguous()
        room = out if as_it_is else torch.empty((min(step, rows), *info.shape[1:]), dtype=stored)
        with WeightFile(self.files[name]) as file:
            for first in range(0, rows, step):
                target = out[first : first + step]
                values = target if as_it_is else room[: len(target)]
                file.read(info.offset + first * row_bytes, values.view(-1).view(torch.uint8).numpy())
                if not as_it_is:
                    target.copy_(values)
                yield values.nbytes
