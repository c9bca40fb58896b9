"""Checkpoints in safetensors files, one or many."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightllmd.errors import WeightsInvalid
from lightllmd.weights.headers import TensorInfo, read_safetensors_header
from lightllmd.weights.index import CHUNK_BYTES

FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}


class SafetensorsCheckpoint:
    """Raises WeightsInvalid for damaged or truncated files and for a tensor that is in two of them."""

    def __init__(self, files: Sequence[str | os.PathLike[str]]) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self._files = {}
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
                self._files[tensor.name] = handle

    def read(self, name: str, out: Tensor) -> Iterator[int]:
        info = self.tensors[name]
        if info.type not in FLOAT_TYPES:
            known = ", ".join(sorted(FLOAT_TYPES))
            raise WeightsInvalid(f"tensor {name} is of type {info.type}, which is not available yet ({known} are)")
        rows = info.shape[0]
        step = max(1, CHUNK_BYTES * rows // max(1, info.nbytes))
        source = self._files[name].get_slice(name)
        for first in range(0, rows, step):
            last = min(rows, first + step)
            out[first:last].copy_(source[first:last])
            yield info.nbytes * last // rows - info.nbytes * first // rows
