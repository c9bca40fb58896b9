"""What safetensors files say about themselves: their headers, and which files make a checkpoint. No weights, no torch.

Format: https://github.com/huggingface/safetensors, "Format"; little-endian.
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import msgspec

from lightllmd.config.files import open_regular
from lightllmd.errors import WeightsInvalid
from lightllmd.weights.model_files import LFS_POINTER, LFS_WORDS, invalid, present, read_listed

SAFETENSORS_INDEX = "model.safetensors.index.json"
MAX_DIMENSIONS = 16  # of a tensor
MAX_TENSORS = 100_000  # in a file
_MAX_SAFETENSORS_HEADER = 100 << 20  # the format's own bound
_SHOWN = 3  # names in a message

SAFETENSORS_ITEM_BYTES: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
SAFETENSORS_READABLE = frozenset({"F64", "F32", "F16", "BF16"})  # what a weight may be stored as


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file, and where it lies there; or one that is made of `shards`, each with a place of its own."""

    name: str
    shape: tuple[int, ...]  # row-major, as torch says it (a GGUF file stores the dimensions reversed)
    type: str  # "F32", "BF16", … or a GGML block type such as "Q4_1"
    offset: int  # of the first byte, from the start of the file; of the first shard where there are any
    nbytes: int  # of the elements, without what lies between them
    file: str  # absolute, or as it was named; of the first shard where there are any
    strides: tuple[int, ...] = ()  # in elements, of a matrix with gaps or stored by columns; (): row-major, gapless
    shards: tuple[TensorInfo, ...] = ()  # in the order in which they are joined along `shard_axis`
    shard_axis: int = 0
    checksum: int = 0  # of its bytes, where the file tells one; 0: none

    @property
    def elements(self) -> int:
        """The product of `shape`."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class SafetensorsHeader:
    """What one file says of itself; tensors in the order in which they lie in it."""

    path: Path
    tensors: list[TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def read_safetensors_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """The header of one file. Raises WeightsInvalid when it is damaged or the file is shorter than it says."""
    path = Path(path)
    raw, size = _header_bytes(path)
    start = 8 + len(raw)
    try:
        entries = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        if len(entries) > MAX_TENSORS:
            raise ValueError(f"{len(entries)} tensors, at most {MAX_TENSORS}")
        metadata = msgspec.json.decode(entries.pop("__metadata__", b"null"), type=dict[str, str] | None) or {}
        tensors = [
            _entry(name, msgspec.json.decode(entry, type=_Entry), start, str(path)) for name, entry in entries.items()
        ]
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise WeightsInvalid(f"{path}: damaged safetensors header: {error}") from None
    tensors.sort(key=lambda tensor: tensor.offset)
    for tensor in tensors:
        if tensor.offset + tensor.nbytes > size:
            raise WeightsInvalid(
                f"{path}: truncated: tensor {tensor.name} ends at byte {tensor.offset + tensor.nbytes}, "
                f"the file has {size}"
            )
    return SafetensorsHeader(path, tensors, metadata)


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """The JSON of a file's header, and the file's size."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if prefix == LFS_POINTER[:8]:
                raise WeightsInvalid(f"{path} {LFS_WORDS}")
            if len(prefix) < 8:
                raise WeightsInvalid(f"{path}: {size} bytes are no safetensors file")
            (length,) = struct.unpack("<Q", prefix)
            if length > _MAX_SAFETENSORS_HEADER:
                raise WeightsInvalid(f"{path}: no safetensors file (a header of {length} bytes)")
            if 8 + length > size:
                raise WeightsInvalid(f"{path}: truncated inside its header ({size} of at least {8 + length} bytes)")
            return file.read(length), size
    except OSError as error:
        raise WeightsInvalid(f"{path}: can't be read: {error.strerror}") from None


def _entry(name: str, entry: _Entry, data_start: int, file: str) -> TensorInfo:
    begin, end = entry.data_offsets
    shape = tuple(entry.shape)
    if begin < 0 or end < begin or any(extent < 0 for extent in shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} lies at {begin}..{end} and has {len(shape)} dimensions")
    item = SAFETENSORS_ITEM_BYTES.get(entry.dtype)
    if item is not None and math.prod(shape) * item != end - begin:
        raise ValueError(f"tensor {name} {entry.dtype}{list(shape)} has {end - begin} bytes")
    return TensorInfo(name, shape, entry.dtype, data_start + begin, end - begin, file)


def safetensors_files(directory: str | os.PathLike[str]) -> list[Path]:
    """The weight files of a Hugging Face directory, in order; empty if it has none.

    As transformers: ``model.safetensors``, else the index's shards, else every ``*.safetensors``.
    Raises WeightsInvalid when a shard is missing, ConfigInvalid when the index can't be used.
    """
    directory = Path(directory)
    if present(directory / "model.safetensors"):
        return [directory / "model.safetensors"]
    index = directory / SAFETENSORS_INDEX
    if present(index):
        names = sorted(set(read_listed(index, _Index).weight_map.values()))
        for name in names:
            if not name or "\0" in name or ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
                raise invalid(f"{index}: {name[:80]!r} is no file of this folder")
        missing = [name for name in names if not present(directory / name)]
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
        missing = missing_parts(names, ".safetensors")
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise WeightsInvalid(f"{directory}: weight files are missing: {', '.join(missing[:_SHOWN])}{more}")
    return [directory / name for name in names]


def missing_parts(names: list[str], suffix: str) -> list[str]:
    """Of files named NAME-00001-of-00003.suffix, the first ones that aren't there; a hostile total costs nothing."""
    parts: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if match := re.fullmatch(rf"(.+)-(\d+)-of-(\d+){re.escape(suffix)}", name):
            parts.setdefault((match[1], match[3]), set()).add(int(match[2]))
    missing: list[str] = []
    for (stem, total), found in parts.items():
        # Of the first len(found) + _SHOWN numbers at least _SHOWN are missing, or the total ends before.
        numbers = range(1, min(int(total), len(found) + _SHOWN + 1) + 1)
        missing += [f"{stem}-{n:0{len(total)}d}-of-{total}{suffix}" for n in numbers if n not in found]
    return missing


def read_safetensors_headers(directory: str | os.PathLike[str]) -> list[SafetensorsHeader]:
    """The headers of all weight files. Raises WeightsInvalid, also when two files hold a tensor of one name."""
    headers = [read_safetensors_header(path) for path in safetensors_files(directory)]
    owner: dict[str, Path] = {}
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in owner:
                raise WeightsInvalid(
                    f"{header.path.parent}: tensor {tensor.name} is in {owner[tensor.name].name} and {header.path.name}"
                )
            owner[tensor.name] = header.path
    return headers
