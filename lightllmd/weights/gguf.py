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
from lightllmd.architecture.weights import TensorCut
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

    def read(self, name: str, out: Tensor, cut: TensorCut | None = None) -> Iterator[int]:
        """As `Checkpoint.read`, of cuts by rows; a quantised tensor is dequantised in chunks."""
        info = self.tensors[name]
        if len(info.shape) == 1 and cut is not None:  # read as a whole, it is small
            whole = torch.empty(info.shape, dtype=out.dtype)
            yield from self.read(name, whole)
            out.copy_(torch.cat([whole[first:behind] for first, behind in cut.runs]))
            return
        view = self._in_file_order(name, out)
        if len(info.shape) == 1:
            view = view.unsqueeze(0)
        for rows, stored in self._chunks(info, self._units(name), cut):
            values = dequantize(stored, GGMLQuantizationType[info.type])
            if info.type in BLOCKS:
                _require_numbers(values, info)
            target = view[rows]
            target.copy_(torch.from_numpy(values).view(target.shape))
            yield stored.nbytes

    def read_matrix(self, name: str, out: QuantisedMatrix, cut: TensorCut | None = None) -> Iterator[int]:
        """Fills a matrix of the tensor's shape and of the scheme that holds its blocks, as `read` does."""
        info = self.tensors[name]
        if out.zeros is not None:
            out.zeros.fill_(Q4_0_ZERO)
        all_values, all_scales = self._in_file_order(name, out.values), self._in_file_order(name, out.scales)
        for rows, stored in self._chunks(info, self._units(name), cut):
            values, scales = UNPACKED[info.type](stored.reshape(-1, BLOCKS[info.type]))
            _require_numbers(scales, info)
            for target, unpacked in ((all_values[rows], values), (all_scales[rows], scales)):
                target.copy_(torch.from_numpy(unpacked).reshape(target.shape))
            yield stored.nbytes

    def _units(self, name: str) -> int:
        """What a tensor is read by: rows, or heads where those are reordered, or the whole of a vector."""
        shape = self.tensors[name].shape
        return self._paired.get(name, shape[0] if len(shape) > 1 else 1)

    def _chunks(self, info: TensorInfo, units: int, cut: TensorCut | None) -> Iterator[tuple[slice, np.ndarray]]:
        """The bytes of a tensor ``[units, …]``, or of some of its rows, some units at a time, and which of all those
        that are wanted they are."""
        unit_bytes, unit_rows = info.nbytes // units, info.shape[0] // units
        step = min(units, max(1, CHUNK_ELEMENTS * units // info.elements))
        stored = np.empty((step, unit_bytes), np.uint8)
        runs = ((0, info.shape[0]),) if cut is None else cut.runs
        assert cut is None or cut.axis == 0
        at = 0
        with WeightFile(info.file) as file:
            for begin, end in runs:
                for first in range(begin // unit_rows, end // unit_rows, step):
                    chunk = stored[: min(step, end // unit_rows - first)]
                    file.read(info.offset + first * unit_bytes, chunk.reshape(-1))
                    yield slice(at, at + len(chunk)), chunk
                    at += len(chunk)

    def _in_file_order(self, name: str, out: Tensor) -> Tensor:
        """`out` seen in the order of the file's rows: as it is, or ``[heads, pair, half, …]`` of reordered ones."""
        if name not in self._paired:
            return out
        dim = self.tensors[name].shape[0] // self._paired[name]
        return out.unflatten(0, (-1, 2, dim // 2)).transpose(1, 2)


def _require_numbers(numbers: np.ndarray, info: TensorInfo) -> None:
    if not np.isfinite(numbers).all():
        raise WeightsInvalid(f"{info.file}: tensor {info.name} is damaged: a block's scale is no number")
