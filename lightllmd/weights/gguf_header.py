"""GGUF headers: metadata and tensor table, also of a split file, and the same as a Hugging Face config. No torch.

Format: GGUF v2/v3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightllmd.architecture.families import gguf_model_type
from lightllmd.config.files import open_regular
from lightllmd.errors import WeightsInvalid, show
from lightllmd.weights.headers import TensorInfo
from lightllmd.weights.locate import GGUF_PART
from lightllmd.weights.model_files import LFS_POINTER, LFS_WORDS

MAX_HEADER = 64 << 20  # bytes; a vocabulary of 260,000 tokens with its merges takes 12 MB
MAX_ENTRIES = 100_000  # of the metadata, and tensors
MAX_ROPE_FACTORS = 4096
MAX_DIMENSIONS = 8  # of a tensor; GGML has four
_PIECE = 1 << 20  # bytes read at a time

# GGML type number -> (name, elements per block, bytes per block)
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip

# What `gguf.dequantize` turns into floats.
GGUF_READABLE = frozenset({
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS",
})  # fmt: skip
ROPE_FREQUENCIES = "rope_freqs.weight"  # a tensor that is part of the config

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufHeader:
    """What precedes the weights in a file, or in all parts of a split one."""

    path: Path  # of a split file its first part
    version: int
    metadata: dict[str, Any]
    tensors: list[TensorInfo]
    files: tuple[Path, ...]  # all parts, in order

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's family; empty where the file has none."""
        return str(self.metadata.get("general.architecture", ""))


class _Cursor:
    """A reading position in a GGUF file, of which no more is read than is asked for; refuses to step beyond its end.

    The file is read, not mapped: one that is cut off meanwhile gives an error, where a mapping would end the process.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.size = os.fstat(fd).st_size
        self.data = bytearray()
        self.at = 0

    def fill(self, end: int) -> None:
        """Reads on until `data` has that many bytes. Raises EOFError, ValueError."""
        if end > self.size:
            raise EOFError
        if end > MAX_HEADER:
            raise ValueError(f"its header is larger than {MAX_HEADER} bytes")
        while len(self.data) < end:
            piece = os.read(self._fd, max(_PIECE, end - len(self.data)))
            if not piece:
                raise EOFError
            self.data += piece

    def take(self, count: int) -> int:
        """Steps over `count` bytes and returns where they start."""
        start, end = self.at, self.at + count
        if end > len(self.data):
            self.fill(end)
        self.at = end
        return start

    def numbers(self, letter: str, count: int) -> list[Any]:
        start = self.take(struct.calcsize(f"<{letter}") * count)
        return list(struct.unpack_from(f"<{count}{letter}", self.data, start))

    def number(self, letter: str) -> Any:
        return self.numbers(letter, 1)[0]

    def string(self) -> str:
        length = int.from_bytes(self.data[self.take(8) : self.at], "little")
        return self.data[self.take(length) : self.at].decode("utf-8", "replace")

    def strings(self, count: int) -> list[str]:
        """An array of strings: the vocabulary and its merges, 100,000 and more, hence the tight loop."""
        data, at = self.data, self.at
        if count * 8 > self.size - at:
            raise EOFError
        out = []
        for _ in range(count):
            if at + 8 > len(data):
                self.fill(at + 8)
            end = at + 8 + int.from_bytes(data[at : at + 8], "little")
            if end > len(data):
                self.fill(end)
            out.append(data[at + 8 : end].decode("utf-8", "replace"))
            at = end
        self.at = at
        return out

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 8:
            raise ValueError(f"metadata value of unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            return self.strings(count)
        if inner in _SCALARS:
            return self.numbers(_SCALARS[inner], count)
        if count > MAX_ENTRIES:
            raise ValueError(f"an array of {count} arrays")
        return [self.value(inner, depth + 1) for _ in range(count)]


def read_gguf_header(path: str | os.PathLike[str]) -> GgufHeader:
    """Metadata and tensor table; of a split file, whose first part is named, those of all parts together. Raises
    WeightsInvalid when a part is damaged, truncated or missing."""
    path = Path(path)
    header = _read_one(path)
    count = header.metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return header
    match = GGUF_PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise WeightsInvalid(f"{path}: a part of a split GGUF must be named NAME-00001-of-{count:05}.gguf")
    if header.metadata.get("split.no") != 0 or int(match[2]) != 1:
        raise WeightsInvalid(
            f"{path} is not the first part of its split GGUF: name {match[1]}-00001-of-{match[3]}.gguf"
        )
    files, tensors = [path], list(header.tensors)
    for number in range(1, count):
        part = _read_one(path.with_name(f"{match[1]}-{number + 1:05}-of-{match[3]}.gguf"))
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (number, count):
            raise WeightsInvalid(f"{part.path}: its metadata does not say that it is part {number + 1} of {count}")
        files.append(part.path)
        tensors += part.tensors
    _require_distinct(path, tensors)
    return GgufHeader(path, header.version, header.metadata, tensors, tuple(files))


def _read_one(path: Path) -> GgufHeader:
    try:
        fd = open_regular(path)
    except OSError as error:
        raise WeightsInvalid(f"{path}: can't be read: {error.strerror}") from None
    cursor = None
    try:
        cursor = _Cursor(fd)
        if cursor.size < 24:
            raise WeightsInvalid(f"{path}: {cursor.size} bytes are no GGUF file")
        header = _parse_gguf(path, cursor)
        _require_distinct(path, header.tensors)
        return header
    except EOFError:
        raise WeightsInvalid(f"{path}: truncated inside its header") from None
    except OSError as error:
        raise WeightsInvalid(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, TypeError, OverflowError, struct.error) as error:
        raise WeightsInvalid(f"{path}: {error}") from None
    finally:
        os.close(fd)


def _require_distinct(path: Path, tensors: list[TensorInfo]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise WeightsInvalid(f"{path}: tensor {tensor.name} is there twice")
        seen.add(tensor.name)


def _parse_gguf(path: Path, cursor: _Cursor) -> GgufHeader:
    magic = bytes(cursor.data[cursor.take(4) : 4])
    if magic != b"GGUF":
        if LFS_POINTER.startswith(magic):
            raise WeightsInvalid(f"{path} {LFS_WORDS}")
        raise ValueError("no GGUF file (its first four bytes are not 'GGUF')")
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version} is not supported (2 and 3 are, little-endian)")
    tensor_count, metadata_count = cursor.numbers("Q", 2)
    for count, what in ((tensor_count, "tensors"), (metadata_count, "entries of metadata")):
        if count > MAX_ENTRIES:
            raise ValueError(f"{count} {what}, at most {MAX_ENTRIES}")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    table = []
    for _ in range(tensor_count):
        name, rank = cursor.string(), cursor.number("I")
        if rank > MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {rank} dimensions, at most {MAX_DIMENSIONS}")
        dimensions = cursor.numbers("Q", rank)
        kind, offset = cursor.number("I"), cursor.number("Q")
        table.append((name, tuple(reversed(dimensions)), kind, offset))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {show(alignment)}")
    data_start = -(-cursor.at // alignment) * alignment
    tensors = [_gguf_tensor(*entry, data_start, str(path)) for entry in table]
    for tensor in tensors:
        end = tensor.offset + tensor.nbytes
        if end > cursor.size:
            raise ValueError(f"truncated: tensor {tensor.name} ends at byte {end}, the file has {cursor.size}")
    return GgufHeader(path, version, metadata, tensors, (path,))


def _gguf_tensor(name: str, shape: tuple[int, ...], kind: int, offset: int, data_start: int, file: str) -> TensorInfo:
    if kind not in GGML_TYPES:
        raise ValueError(f"tensor {name} has unknown GGML type {kind}")
    type_name, block, block_bytes = GGML_TYPES[kind]
    if shape and shape[-1] % block:
        raise ValueError(f"tensor {name} {type_name}{list(shape)}: rows are no multiple of {block}")
    return TensorInfo(name, shape, type_name, data_start + offset, math.prod(shape) // block * block_bytes, file)


# --- a GGUF header in Hugging Face words ---------------------------------------------------------------------------


def gguf_dtype(header: GgufHeader) -> str | None:
    """The dtype that the matrices have in the file: "float32", "float16", "bfloat16", or None if they are quantised."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    kinds = {tensor.type for tensor in header.tensors if len(tensor.shape) > 1}
    return names.get(kinds.pop()) if len(kinds) == 1 else None


def gguf_hf_config(header: GgufHeader) -> dict[str, Any]:
    """The file's metadata as a Hugging Face ``config.json`` would say it. Raises WeightsInvalid on a missing key or one
    of another type than its format says."""
    try:
        return _hf_config(header)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise WeightsInvalid(f"{header.path}: its metadata is not as the format says: {error}") from None


def _hf_config(header: GgufHeader) -> dict[str, Any]:
    arch = header.architecture
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}

    def get(key: str, default: Any = None) -> Any:
        return header.metadata.get(f"{arch}.{key}", default)

    def need(key: str) -> int:
        value = get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise WeightsInvalid(
                f"{header.path}: metadata {arch}.{key} is {'missing' if value is None else show(value)}"
            )
        return value

    if arch == "clip":
        raise WeightsInvalid(
            f"{header.path} is the vision tower of a model (mmproj); vision from GGUF files is not available yet, "
            "safetensors are"
        )
    if "token_embd.weight" not in shapes:
        raise WeightsInvalid(f"{header.path}: tensor token_embd.weight is missing: no language model")
    hidden, heads = need("embedding_length"), need("attention.head_count")
    if heads < 1:
        raise WeightsInvalid(f"{header.path}: metadata {arch}.attention.head_count is {heads}")
    head_dim = get("attention.key_length") or hidden // heads
    rope_dim = get("rope.dimension_count", head_dim)
    config: dict[str, Any] = {
        "model_type": gguf_model_type(arch, bool(get("expert_count", 0))),
        "hidden_size": hidden,
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": need("feed_forward_length"),
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": _short(get("attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_theta": _short(get("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(header, head_dim),
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _one_or_list(gguf_eos_ids(header)),
        "torch_dtype": gguf_dtype(header),
    }
    if rope_dim != head_dim:
        config["partial_rotary_factor"] = rope_dim / head_dim
    return config


END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eom_id|>")
_CONTROL_TOKEN = 3


def gguf_eos_ids(header: GgufHeader) -> list[int]:
    """Ids that end a turn: the metadata's eos, eot and eom, and the end-of-turn tokens of its chat template."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [header.metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    template = str(header.metadata.get("tokenizer.chat_template", ""))
    wanted = {text for text in END_OF_TURN if text in template}
    if wanted:
        tokens = header.metadata.get("tokenizer.ggml.tokens", [])
        types = header.metadata.get("tokenizer.ggml.token_type", [])
        pairs = enumerate(zip(tokens, types, strict=False))
        found += [number for number, (text, kind) in pairs if kind == _CONTROL_TOKEN and text in wanted]
    return list(dict.fromkeys(number for number in found if isinstance(number, int)))


def _rope_scaling(header: GgufHeader, head_dim: int) -> dict[str, Any] | None:
    arch, metadata = header.architecture, header.metadata
    factors = _rope_factors(header)
    if factors is not None:
        return _llama3_scaling(factors, head_dim, metadata.get(f"{arch}.rope.freq_base", 10000.0))
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    factor = metadata.get(f"{arch}.rope.scaling.factor", metadata.get(f"{arch}.rope.scale_linear", 1.0))
    if kind == "none" and f"{arch}.rope.scale_linear" in metadata and factor != 1.0:
        kind = "linear"
    if kind == "none":
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": _short(factor)}
    original = metadata.get(f"{arch}.rope.scaling.original_context_length")
    if original:
        scaling["original_max_position_embeddings"] = original
    return scaling


def _rope_factors(header: GgufHeader) -> list[float] | None:
    """The tensor ``rope_freqs.weight`` [head_dim / 2], by which llama.cpp's converter expresses llama3 scaling."""
    tensor = next((tensor for tensor in header.tensors if tensor.name == ROPE_FREQUENCIES), None)
    if tensor is None:
        return None
    if tensor.type != "F32" or len(tensor.shape) != 1:
        raise WeightsInvalid(f"{header.path}: rope_freqs.weight is {tensor.type}{list(tensor.shape)}")
    if tensor.elements > MAX_ROPE_FACTORS:
        raise WeightsInvalid(f"{header.path}: {ROPE_FREQUENCIES} has {tensor.elements} elements")
    try:
        with os.fdopen(open_regular(tensor.file), "rb") as file:
            file.seek(tensor.offset)
            return list(struct.unpack(f"<{tensor.elements}f", file.read(tensor.nbytes)))
    except (OSError, struct.error) as error:
        raise WeightsInvalid(f"{tensor.file}: {ROPE_FREQUENCIES} can't be read: {error}") from None


def _llama3_scaling(factors: list[float], head_dim: int, theta: float) -> dict[str, Any] | None:
    """The llama3 scaling whose divisors these are; where none fits, the same divisors in longrope's words."""
    if all(factor == 1.0 for factor in factors):
        return None
    factor, low, high, original = _short(max(factors)), 1.0, 4.0, 8192
    for index, given in enumerate(factors):
        wavelength = 2 * math.pi * theta ** (2 * index / head_dim)
        smooth = (original / wavelength - low) / (high - low)
        expected = 1.0 if smooth > 1 else factor if smooth < 0 else 1 / ((1 - smooth) / factor + smooth)
        if abs(given - expected) > 1e-3 * expected:
            return {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _short(value: float) -> float:
    """A float32 as the decimal number that it was written from."""
    return float(f"{value:.7g}")


def _one_or_list(ids: list[int]) -> int | list[int] | None:
    return ids[0] if len(ids) == 1 else ids or None
