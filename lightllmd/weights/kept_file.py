"""A quantised model in one file of our own: what quantising a checkpoint made, so that the next start reads that.

A safetensors file whose header follows from what is expected of it, so that another one is not the same model. Behind
the weights, in their order, lies the tensor ``checksums``: CRC-32 of each `PIECE_BYTES` of each tensor, and last of all
those of the header and of the checksums before it. Nothing is taken from a file before its checksum has been compared.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from lightllmd.architecture.weight_schemes import WeightSchemes
from lightllmd.architecture.weights import WeightSpec
from lightllmd.errors import WeightsInvalid
from lightllmd.kernels import quantised
from lightllmd.kernels.dequantised_linear import pack_nibbles, unpack_nibbles
from lightllmd.kernels.quantised import QuantisedMatrix
from lightllmd.weights.files import WeightFile
from lightllmd.weights.loaded import LoadedWeight, Progress, room
from lightllmd.weights.staged import PIECE_BYTES, Arrival, Piece, upload

FORMAT = 1
TYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}
CHECKSUMS = "checksums"
_META = torch.device("meta")


class KeptDamaged(WeightsInvalid):
    """A kept file is not what it should be."""


@dataclass(frozen=True)
class Contents:
    """What a file holds, without its values. `key`: the fingerprint of what it was made of."""

    key: str
    weights: Sequence[WeightSpec]
    schemes: WeightSchemes
    dtype: torch.dtype  # of all that is not quantised

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """By name, in their order, without memory."""
        for weight in self.weights:
            yield from _tensors(self.room(weight, _META))

    def room(self, weight: WeightSpec, device: torch.device) -> LoadedWeight:
        """A weight to be filled; 4-bit values are two in a byte, as in the file."""
        bias = room(weight.bias, self.dtype, device) if weight.bias else None
        scheme = self.schemes.of(weight)
        if scheme.dense:
            return LoadedWeight(weight, room(weight.parts, self.dtype, device), bias)
        shape = sum(part.shape[0] for part in weight.parts), weight.parts[0].shape[1]
        matrix = quantised.empty(scheme, shape, self.dtype, device)
        if scheme.values == "uint4":
            packed = torch.empty((shape[0], -(-shape[1] // 2)), dtype=torch.uint8, device=device)
            matrix = replace(matrix, values=packed)
        return LoadedWeight(weight, matrix, bias)

    @property
    def header(self) -> bytes:
        """The file's, with its length before it, a multiple of 8 bytes."""
        places: dict[str, object] = {"__metadata__": {"made_by": f"lightllmd {FORMAT}", "key": self.key}}
        end = 0
        for name, tensor in self.tensors():
            begin, end = end, end + tensor.nbytes
            places[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        count = self._pieces + 2
        places[CHECKSUMS] = {"dtype": "U32", "shape": [count], "data_offsets": [end, end + 4 * count]}
        written = msgspec.json.encode(places)
        written += b" " * (-len(written) % 8)
        return struct.pack("<Q", len(written)) + written

    @property
    def _pieces(self) -> int:
        return sum(_pieces(tensor.nbytes) for _, tensor in self.tensors())

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return len(self.header) + self.value_bytes + 4 * (self._pieces + 2)

    @property
    def value_bytes(self) -> int:
        """Of the weights in it."""
        return sum(tensor.nbytes for _, tensor in self.tensors())


class KeptFileWriter:
    """Writes weights in their order into an open file, which is not whole before `finish`. Raises OSError."""

    def __init__(self, descriptor: int, contents: Contents) -> None:
        self._descriptor = descriptor
        self._header = contents.header
        self._checksums: list[int] = []
        self._write(memoryview(self._header))

    def write(self, loaded: LoadedWeight) -> None:
        """Of a weight in host memory, as `packed` has it."""
        for _, tensor in _tensors(loaded):
            stored = _bytes(tensor).numpy().data
            for begin in range(0, len(stored), PIECE_BYTES):
                piece = stored[begin : begin + PIECE_BYTES]
                self._checksums.append(zlib.crc32(piece))
                self._write(piece)

    def finish(self) -> None:
        """The checksums, and all of it on the disk."""
        self._checksums.append(zlib.crc32(self._header))
        listed = struct.pack(f"<{len(self._checksums)}I", *self._checksums)
        self._write(memoryview(listed + struct.pack("<I", zlib.crc32(listed))))
        os.fsync(self._descriptor)

    def _write(self, stored: memoryview) -> None:
        while stored:
            stored = stored[os.write(self._descriptor, stored) :]


def packed(loaded: LoadedWeight) -> LoadedWeight:
    """In host memory, as a file holds it."""
    tensor, bias = loaded.tensor, loaded.bias
    if isinstance(tensor, QuantisedMatrix):
        if tensor.scheme.values == "uint4":
            tensor = replace(tensor, values=pack_nibbles(tensor.values))
        tensor = tensor.to(torch.device("cpu"))
    else:
        tensor = tensor.cpu()
    return LoadedWeight(loaded.spec, tensor, None if bias is None else bias.cpu())


def read_kept(path: Path, contents: Contents, device: torch.device, progress: Progress) -> Iterator[LoadedWeight]:
    """The weights on the device, as quantising made them. The file may be replaced or removed meanwhile. Raises
    KeptDamaged."""
    try:
        with WeightFile(str(path)) as file:
            header = contents.header
            checksums = _checksums(path, file, header, contents.nbytes)
            upcoming = iter(checksums)
            at = len(header)

            def arrivals() -> Iterator[Arrival[LoadedWeight]]:
                nonlocal at
                for weight in contents.weights:
                    loaded = contents.room(weight, device)
                    pieces = []
                    for name, tensor in _tensors(loaded):
                        for part in _bytes(tensor).split(PIECE_BYTES):
                            read = partial(_read, path, file, at, next(upcoming), name)
                            pieces.append(Piece(read, len(part), torch.uint8, part))
                            at += len(part)
                    yield Arrival(loaded, pieces)

            with closing(upload(arrivals(), contents.value_bytes, device, progress)) as arrived:
                yield from map(_unpacked, arrived)
    except KeptDamaged:
        raise
    except WeightsInvalid as unreadable:
        raise KeptDamaged(str(unreadable)) from None


def _checksums(path: Path, file: WeightFile, header: bytes, nbytes: int) -> list[int]:
    """Of the pieces of all tensors."""
    if (found := os.stat(path).st_size) != nbytes:
        raise KeptDamaged(f"{path}: has {found} bytes, not {nbytes}")
    begun = np.empty(len(header), np.uint8)
    file.read(0, begun)
    if begun.tobytes() != header:
        raise KeptDamaged(f"{path}: its header is another model's, or damaged")
    (length,) = struct.unpack("<Q", header[:8])
    places = msgspec.json.decode(header[8 : 8 + length])
    begin, end = places[CHECKSUMS]["data_offsets"]
    stored = np.empty(end - begin, np.uint8)
    file.read(len(header) + begin, stored)
    *listed, own = stored.view("<u4").tolist()
    if zlib.crc32(stored[:-4].tobytes()) != own or listed.pop() != zlib.crc32(header):
        raise KeptDamaged(f"{path}: its checksums are damaged")
    return listed


def _read(path: Path, file: WeightFile, offset: int, checksum: int, name: str, into: np.ndarray) -> None:
    file.read(offset, into)
    if zlib.crc32(into.data) != checksum:
        raise KeptDamaged(f"{path}: tensor {name} is damaged: its checksum is another")


def _unpacked(loaded: LoadedWeight) -> LoadedWeight:
    matrix = loaded.tensor
    if isinstance(matrix, Tensor) or matrix.scheme.values != "uint4":
        return loaded
    columns = loaded.spec.parts[0].shape[1]
    return loaded._replace(tensor=replace(matrix, values=unpack_nibbles(matrix.values, columns)))


def _tensors(loaded: LoadedWeight) -> Iterator[tuple[str, Tensor]]:
    key, matrix = loaded.spec.key, loaded.tensor
    if isinstance(matrix, Tensor):
        yield f"{key}.weight", matrix
    else:
        yield f"{key}.values", matrix.values
        yield f"{key}.scales", matrix.scales
        if matrix.zeros is not None:
            yield f"{key}.zeros", matrix.zeros
    if loaded.bias is not None:
        yield f"{key}.bias", loaded.bias


def _bytes(tensor: Tensor) -> Tensor:
    """A flat view ``[nbytes]``, of a copy where it is not contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _pieces(nbytes: int) -> int:
    return -(-nbytes // PIECE_BYTES)
