"""Checkpoints in safetensors files, one or many."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightllmd.errors import WeightsInvalid
from lightllmd.weights.headers import TensorInfo, read_safetensors_header
from lightllmd.weights.index import CHUNK_BYTES

FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsCheckpoint:
    """Raises WeightsInvalid for damaged or truncated files and for a tensor that is in two of them."""

    def __init__(self, files: Sequence[str | os.PathLike[str]]) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self.files: dict[str, str] = {}  # of each tensor
        self._handles = {}
        for file in files:
            try:
                header = read_safetensors_header(file)
                handle = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise WeightsInvalid(f"{file}: {error}") from None
            for tensor in header.tensors:
                if tensor.name in self.tensors:
                    raise WeightsInvalid(f"tensor {tensor.name} is in {file} and in another file before it")
                self.tensors[tensor.name] = tensor
                self.files[tensor.name] = os.fspath(file)
                self._handles[tensor.name] = handle

    def dtype(self, name: str) -> torch.dtype:
        """Raises WeightsInvalid where it is none for a weight."""
        kind = self.tensors[name].type
        if kind not in FLOAT_TYPES:
            known = ", ".join(sorted(FLOAT_TYPES))
            raise WeightsInvalid(f"tensor {name} is of type {kind}, which is not available yet ({known} are)")
        return FLOAT_TYPES[kind]

    def read(self, name: str, out: Tensor) -> Iterator[int]:
        self.dtype(name)
        info = self.tensors[name]
        rows = info.shape[0]
        step = max(1, CHUNK_BYTES * rows // max(1, info.nbytes))
        source = self._handles[name].get_slice(name)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            out[first:last].copy_(source[first:last])
            yield info.nbytes * last // rows - info.nbytes * first // rows
