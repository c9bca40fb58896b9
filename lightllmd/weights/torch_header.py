"""What a file of torch.save says of its tensors: the zip directory and the pickle in it. No weights, no torch.

Format: a zip archive whose records are stored, not compressed (PyTorch's "serialization" notes): NAME/data.pkl, the
pickle; NAME/data/KEY, the elements of one storage; NAME/byteorder. Nothing is unpickled (`torch_pickle`).
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from itertools import pairwise
from pathlib import Path
from typing import IO

from lightllmd.config.files import open_regular
from lightllmd.errors import WeightsInvalid, show
from lightllmd.weights.headers import MAX_DIMENSIONS, SAFETENSORS_ITEM_BYTES, TensorInfo
from lightllmd.weights.model_files import LFS_POINTER, LFS_WORDS
from lightllmd.weights.torch_pickle import MAX_PICKLE, StoredTensor, read_state

MAX_DIRECTORY = 1 << 20  # bytes; 60 and the name for each record
ITEM_BYTES = {**SAFETENSORS_ITEM_BYTES, "C64": 8, "C128": 16}
_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # in a pickle, behind its protocol: torch.save before 1.6
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # magic, …, lengths of name and extra field
_ENCRYPTED = 1  # bit of a record's flags
_CHUNK = 64 << 10


def read_torch_header(path: str | os.PathLike[str]) -> list[TensorInfo]:
    """The tensors of a state dict, in its order. Raises WeightsInvalid when the file is damaged, truncated, of another
    format or byte order, or its pickle holds anything but tensors."""
    path = Path(path)
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            _require_zip(path, file)
            with zipfile.ZipFile(_Bounded(file)) as archive:
                return _Archive(path, file, archive).tensors()
    except OSError as error:
        raise WeightsInvalid(f"{path}: can't be read: {error.strerror or error}") from None
    except zipfile.BadZipFile as damaged:
        raise WeightsInvalid(f"{path}: truncated or damaged: its zip directory can't be read: {damaged}") from None
    except (ValueError, NotImplementedError, ArithmeticError, struct.error, EOFError, LookupError) as error:
        raise WeightsInvalid(f"{path}: {_line(error)}") from None


def _line(error: Exception) -> str:
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(error).split()))
    return text if len(text) <= 300 else f"{text[:299]}…"


def _require_zip(path: Path, file: IO[bytes]) -> None:
    """Raises WeightsInvalid for what is no zip archive from its first byte on."""
    start = file.read(40)
    if start.startswith(_ZIP_MAGIC):
        return
    if start.startswith(LFS_POINTER[:8]):
        raise WeightsInvalid(f"{path} {LFS_WORDS}")
    if _LEGACY_MAGIC in start:
        raise WeightsInvalid(
            f"{path}: is in the format of torch before 1.6, which is not available; torch.load and torch.save write it "
            "anew"
        )
    size = os.fstat(file.fileno()).st_size
    raise WeightsInvalid(f"{path}: {size} bytes are no file of torch.save (a zip archive)")


class _Bounded:
    """A file of which no more than MAX_DIRECTORY bytes are read at a time, whatever its own sizes say."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self.seekable, self.tell = file.seekable, file.tell

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, count: int = -1) -> bytes:
        wanted = self._size - self._file.tell() if count < 0 else count
        if wanted > MAX_DIRECTORY:
            raise ValueError(f"its zip directory has {wanted} bytes, at most {MAX_DIRECTORY} are read")
        return self._file.read(wanted)


class _Archive:
    """One file's records, each found through the directory and checked against its own header."""

    def __init__(self, path: Path, file: IO[bytes], archive: zipfile.ZipFile) -> None:
        self._path, self._file, self._end = path, file, archive.start_dir
        self._records: dict[str, zipfile.ZipInfo] = {}
        for record in archive.infolist():
            if record.filename in self._records:
                raise ValueError(f"record {show(record.filename)} is there twice")
            self._records[record.filename] = record
        self._places: dict[str, tuple[int, int]] = {}  # first byte and size, of the records looked at

    def tensors(self) -> list[TensorInfo]:
        """Raises ValueError."""
        pickles = [name for name in self._records if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"a zip archive with {len(pickles)} records named NAME/data.pkl, not a file of torch.save")
        top = pickles[0].removesuffix("data.pkl")
        if f"{top}constants.pkl" in self._records:
            raise ValueError("a TorchScript archive (torch.jit.save), not a state dict of torch.save")
        if f"{top}byteorder" in self._records:
            order = self._read(f"{top}byteorder", 16)
            if order != b"little":
                raise ValueError(f"its byte order is {show(order.decode('latin-1'))}, little-endian is needed")
        pickle = self._read(pickles[0], MAX_PICKLE)
        try:
            state = read_state(pickle)
        except ValueError as fault:
            raise ValueError(f"its pickle can't be read: {fault}") from None
        found = [self._tensor(name, tensor, f"{top}data/{tensor.storage.key}") for name, tensor in state.items()]
        self._require_apart()
        return found

    def _tensor(self, name: str, tensor: StoredTensor, record: str) -> TensorInfo:
        storage, shape = tensor.storage, tensor.shape
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"tensor {show(name)} has {len(shape)} dimensions, at most {MAX_DIMENSIONS}")
        begin, size = self._place(record)
        if size != storage.elements * ITEM_BYTES[storage.type]:
            raise ValueError(
                f"record {show(record)} of tensor {show(name)} has {size} bytes, {storage.elements} elements of type "
                f"{storage.type} don't fill them"
            )
        item, elements = ITEM_BYTES[tensor.type], math.prod(shape)
        span = 1 + sum((extent - 1) * step for extent, step in zip(shape, tensor.strides, strict=True))
        if elements and (tensor.offset + span) * item > size:
            raise ValueError(
                f"tensor {show(name)} {list(shape)} goes beyond its storage of {size} bytes (record {show(record)})"
            )
        strides = _gaps(name, shape, tensor.strides)
        return TensorInfo(
            name,
            shape,
            tensor.type,
            begin + tensor.offset * item,
            elements * item,
            str(self._path),
            strides,
            checksum=self._records[record].CRC if elements * item == size else 0,
        )

    def _read(self, name: str, limit: int) -> bytes:
        begin, size = self._place(name)
        if size > limit:
            raise ValueError(f"record {show(name)} has {size} bytes, at most {limit} are read")
        self._file.seek(begin)
        body = self._file.read(size)
        checksum = self._records[name].CRC
        if checksum and checksum != zlib.crc32(body):  # torch may leave it 0
            raise ValueError(f"record {show(name)} is damaged: its checksum is another")
        return body

    def _place(self, name: str) -> tuple[int, int]:
        """The first byte of a record's content, and its size."""
        if name in self._places:
            return self._places[name]
        record = self._records.get(name)
        if record is None:
            raise ValueError(f"record {show(name)} is missing")
        if record.flag_bits & _ENCRYPTED:
            raise ValueError(f"record {show(name)} is encrypted")
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise ValueError(f"record {show(name)} is compressed; torch.save stores records as they are")
        if record.header_offset < 0:
            raise ValueError(f"record {show(name)} begins at byte {record.header_offset}")
        self._file.seek(record.header_offset)
        header = self._file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(_ZIP_MAGIC):
            raise ValueError(f"record {show(name)} has no header where the directory says")
        _, named, extra = _LOCAL_HEADER.unpack(header)
        if self._file.read(min(named, _CHUNK)).decode("utf-8", "replace") != record.orig_filename:
            raise ValueError(f"record {show(name)} has another name in its own header")
        begin = record.header_offset + _LOCAL_HEADER.size + named + extra
        if begin + record.file_size > self._end:
            raise ValueError(f"truncated: record {show(name)} ends at byte {begin + record.file_size} of {self._end}")
        return self._places.setdefault(name, (begin, record.file_size))

    def _require_apart(self) -> None:
        """Raises ValueError where two records share bytes."""
        places = sorted((begin, size, name) for name, (begin, size) in self._places.items() if size)
        for (begin, size, name), (next_begin, _, other) in pairwise(places):
            if begin + size > next_begin:
                raise ValueError(f"records {show(name)} and {show(other)} overlap")


def _gaps(name: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """`strides` as `TensorInfo` has them. Raises ValueError where they are not those of a matrix with its rows, or its
    columns, each in one run."""
    expected, gapless = 1, True
    for extent, step in zip(reversed(shape), reversed(strides), strict=True):
        gapless &= extent == 1 or step == expected
        expected *= extent
    if gapless or 0 in shape:
        return ()
    if len(shape) == 2:
        (rows, columns), (down, right) = shape, strides
        if (right == 1 and down >= columns) or (down == 1 and right >= rows):
            return strides
    raise ValueError(f"tensor {show(name)} {list(shape)} has strides {list(strides)}: save it contiguous")
