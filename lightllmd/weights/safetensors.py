"""Checkpoints in safetensors files, one or many."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lightllmd.errors import WeightsInvalid
from lightllmd.weights.headers import TensorInfo, read_safetensors_header
from lightllmd.weights.plain import PlainCheckpoint


class SafetensorsCheckpoint(PlainCheckpoint):
    """Raises WeightsInvalid for damaged, truncated or missing files and for a tensor that is in two of them."""

    def __init__(self, files: Sequence[str | os.PathLike[str]]) -> None:
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for tensor in read_safetensors_header(file).tensors:
                if tensor.name in tensors:
                    raise WeightsInvalid(f"tensor {tensor.name} is in {file} and in another file before it")
                tensors[tensor.name] = tensor
        super().__init__(tensors)
