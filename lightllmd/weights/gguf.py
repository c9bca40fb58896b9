"""Checkpoints in one GGUF file (llama.cpp): blocks are dequantised as they are read, or taken as they are.

llama.cpp names tensors its own way, and its converter reorders the rows of q and k of some families so that a rotary
pair is adjacent (`architecture.family.Gguf`); both are undone here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize
from torch import Tensor

from lightllmd.architecture.families import architecture_of
from lightllmd.errors import WeightsInvalid
from lightllmd.kernels.quantised import QuantisedMatrix
from lightllmd.weights.files import WeightFile
from lightllmd.weights.gguf_blocks import Q4_0_ZERO, UNPACKED
from lightllmd.weights.gguf_header import GGML_TYPES, GGUF_READABLE, gguf_hf_config, read_gguf_header
from lightllmd.weights.gguf_names import hugging_face_tensors
from lightllmd.weights.headers import TensorInfo

# Elements unpacked at a time: the temporaries of numpy's passes stay in the CPU's cache.
CHUNK_ELEMENTS = 256 * 1024
BLOCKS = {name: size for name, elements, size in GGML_TYPES.values() if elements > 1}  # bytes of one


class GgufCheckpoint:
    """Raises WeightsInvalid for a damaged, truncated or missing file, ConfigInvalid for a model that is not built."""

    readable = GGUF_READABLE

    def __init__(self, file: str | os.PathLike[str]) -> None:
        header = read_gguf_header(file)
        config = gguf_hf_config(header)
        architecture = architecture_of(config["model_type"], config)
        gguf = architecture.family.gguf
        self.tensors = hugging_face_tensors(header, architecture.family)
        stored = [part for weight in architecture.weights for part in weight.stored]
        # Heads of each tensor whose rows are reordered within them.
        self._paired = {
            part.name: part.shape[0] // part.shard_unit for part in stored if gguf and part.kind in gguf.paired
        }

    def read(self, name: str, out: Tensor) -> Iterator[int]:
        """As `Checkpoint.read`; a quantised tensor is dequantised in chunks."""
        info = self.tensors[name]
        view = self._in_file_order(name, out)
        if len(info.shape) == 1:
            view = view.unsqueeze(0)
        for rows, stored in self._chunks(info, len(view)):
            values = dequantize(stored, GGMLQuantizationType[info.type])
            if info.type in BLOCKS:
                _require_numbers(values, info)
            target = view[rows]
            target.copy_(torch.from_numpy(values).view(target.shape))
            yield stored.nbytes

    def read_matrix(self, name: str, out: QuantisedMatrix) -> Iterator[int]:
        """Fills a matrix of the tensor's shape and of the scheme that holds its blocks, as `read` does."""
        info = self.tensors[name]
        if out.zeros is not None:
            out.zeros.fill_(Q4_0_ZERO)
        all_values, all_scales = self._in_file_order(name, out.values), self._in_file_order(name, out.scales)
        for rows, stored in self._chunks(info, len(all_values)):
            values, scales = UNPACKED[info.type](stored.reshape(-1, BLOCKS[info.type]))
            _require_numbers(scales, info)
            for target, unpacked in ((all_values[rows], values), (all_scales[rows], scales)):
                target.copy_(torch.from_numpy(unpacked).reshape(target.shape))
            yield stored.nbytes

    def _chunks(self, info: TensorInfo, units: int) -> Iterator[tuple[slice, np.ndarray]]:
        """The bytes of a tensor ``[units, …]``, some of them at a time: rows, or heads where those are reordered, or
        the whole of a vector."""
        unit_bytes = info.nbytes // units
        step = min(units, max(1, CHUNK_ELEMENTS * units // info.elements))
        stored = np.empty((step, unit_bytes), np.uint8)
        with WeightFile(info.file) as file:
            for first in range(0, units, step):
                chunk = stored[: min(step, units - first)]
                file.read(info.offset + first * unit_bytes, chunk.reshape(-1))
                yield slice(first, first + len(chunk)), chunk

    def _in_file_order(self, name: str, out: Tensor) -> Tensor:
        """`out` seen in the order of the file's rows: as it is, or ``[heads, pair, half, …]`` of reordered ones."""
        heads = self._paired.get(name)
        return out if heads is None else out.unflatten(0, (heads, 2, -1)).transpose(1, 2)


def _require_numbers(numbers: np.ndarray, info: TensorInfo) -> None:
    if not np.isfinite(numbers).all():
        raise WeightsInvalid(f"{info.file}: tensor {info.name} is damaged: a block's scale is no number")
