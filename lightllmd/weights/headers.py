"""What a checkpoint says about itself: safetensors and GGUF headers, and where a model lies. No weights, no torch.

Formats: safetensors (https://github.com/huggingface/safetensors, "Format"), GGUF v2/v3
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Both are little-endian.
"""

from __future__ import annotations

import importlib.util
import json
import math
import mmap
import operator
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightllmd.errors import ConfigInvalid, Problem, WeightsInvalid

PACKAGE_PREFIX = "package:"
SAFETENSORS_INDEX = "model.safetensors.index.json"
_MAX_SAFETENSORS_HEADER = 100 << 20  # the format's own bound

SAFETENSORS_ITEM_BYTES: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip

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


@dataclass(frozen=True, slots=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]  # row-major, as torch says it (a GGUF file stores the dimensions reversed)
    type: str  # "F32", "BF16", … or a GGML block type such as "Q4_1"
    offset: int  # of the first byte, from the start of the file
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class SafetensorsHeader:
    path: Path
    tensors: list[TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GgufHeader:
    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: list[TensorInfo]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))


# --- safetensors --------------------------------------------------------------------------------------------


def read_safetensors_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """The header of one file. Raises WeightsInvalid when it is damaged or the file is shorter than it says."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise WeightsInvalid(f"{path}: {size} bytes are no safetensors file")
        (length,) = struct.unpack("<Q", prefix)
        if length > _MAX_SAFETENSORS_HEADER:
            raise WeightsInvalid(f"{path}: no safetensors file (a header of {length} bytes)")
        if 8 + length > size:
            raise WeightsInvalid(f"{path}: truncated inside its header ({size} of at least {8 + length} bytes)")
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        metadata = entries.pop("__metadata__", None) or {}
        tensors = [_safetensors_entry(name, entry, 8 + length) for name, entry in entries.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WeightsInvalid(f"{path}: damaged safetensors header: {error!r}") from None
    tensors.sort(key=lambda tensor: tensor.offset)
    for tensor in tensors:
        if tensor.offset + tensor.nbytes > size:
            raise WeightsInvalid(
                f"{path}: truncated: tensor {tensor.name} ends at byte {tensor.offset + tensor.nbytes}, "
                f"the file has {size}"
            )
    return SafetensorsHeader(path, tensors, metadata)


def _safetensors_entry(name: str, entry: dict[str, Any], data_start: int) -> TensorInfo:
    begin, end = map(operator.index, entry["data_offsets"])
    shape = tuple(map(operator.index, entry["shape"]))
    kind = str(entry["dtype"])
    item = SAFETENSORS_ITEM_BYTES.get(kind)
    if begin < 0 or end < begin or any(extent < 0 for extent in shape):
        raise ValueError(f"tensor {name} lies at {begin}..{end}")
    if item is not None and math.prod(shape) * item != end - begin:
        raise ValueError(f"tensor {name} {kind}{list(shape)} has {end - begin} bytes")
    return TensorInfo(name, shape, kind, data_start + begin, end - begin)


def safetensors_files(directory: str | os.PathLike[str]) -> list[Path]:
    """The weight files of a Hugging Face directory, in order; empty if it has none.

    As transformers: ``model.safetensors``, else the index's shards, else every ``*.safetensors``.
    Raises WeightsInvalid when a shard is missing.
    """
    directory = Path(directory)
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    index = directory / SAFETENSORS_INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightsInvalid(f"{index}: damaged index: {error!r}") from None
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
        shards = [match for name in names if (match := re.fullmatch(r"(.+)-(\d+)-of-(\d+)\.safetensors", name))]
        for stem, total in {(match[1], match[3]) for match in shards}:
            numbers = range(1, int(total) + 1)
            names = sorted({*names, *(f"{stem}-{n:0{len(total)}d}-of-{total}.safetensors" for n in numbers)})
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise WeightsInvalid(f"{directory}: of {len(names)} weight files {', '.join(missing)} missing")
    return [directory / name for name in names]


def read_safetensors_headers(directory: str | os.PathLike[str]) -> list[SafetensorsHeader]:
    """The headers of all weight files. Raises WeightsInvalid, also when two files hold a tensor of one name."""
    headers = [read_safetensors_header(path) for path in safetensors_files(directory)]
    owner: dict[str, Path] = {}
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in owner:
                raise WeightsInvalid(f"tensor {tensor.name} is in {owner[tensor.name].name} and {header.path.name}")
            owner[tensor.name] = header.path
    return headers


# --- GGUF -------------------------------------------------------------------------------------------------------

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _Cursor:
    """A reading position in a mapped GGUF file; refuses to step beyond its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> int:
        """Steps over `count` bytes and returns where they start."""
        start, end = self.at, self.at + count
        if end > len(self.data):
            raise EOFError
        self.at = end
        return start

    def numbers(self, letter: str, count: int) -> list[Any]:
        layout = f"<{count}{letter}"
        return list(struct.unpack_from(layout, self.data, self.take(struct.calcsize(layout))))

    def number(self, letter: str) -> Any:
        return self.numbers(letter, 1)[0]

    def string(self) -> str:
        length = int.from_bytes(self.data[self.take(8) : self.at], "little")
        return self.data[self.take(length) : self.at].decode("utf-8", "replace")

    def strings(self, count: int) -> list[str]:
        """An array of strings: the vocabulary and its merges, 100,000 and more, hence the tight loop."""
        data, at, size = self.data, self.at, len(self.data)
        if count * 8 > size - at:
            raise EOFError
        out = []
        for _ in range(count):
            end = at + 8 + int.from_bytes(data[at : at + 8], "little")
            if end > size:
                raise EOFError
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
            if count > len(self.data):
                raise EOFError
            return self.numbers(_SCALARS[inner], count)
        return [self.value(inner, depth + 1) for _ in range(count)]


def read_gguf_header(path: str | os.PathLike[str]) -> GgufHeader:
    """Metadata and tensor table of a GGUF file. Raises WeightsInvalid when it is damaged or truncated."""
    path = Path(path)
    size = path.stat().st_size
    if size < 24:
        raise WeightsInvalid(f"{path}: {size} bytes are no GGUF file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data)
        try:
            return _parse_gguf(path, cursor, size)
        except EOFError:
            raise WeightsInvalid(f"{path}: truncated inside its header (the file has {size} bytes)") from None
        except (ValueError, TypeError) as error:
            raise WeightsInvalid(f"{path}: {error}") from None


def _parse_gguf(path: Path, cursor: _Cursor, size: int) -> GgufHeader:
    if cursor.data[cursor.take(4) : 4] != b"GGUF":
        raise ValueError("no GGUF file (its first four bytes are not 'GGUF')")
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version} is not supported (2 and 3 are, little-endian)")
    tensor_count, metadata_count = cursor.numbers("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    if metadata.get("split.count", 0) > 1:
        raise ValueError("one part of a split GGUF; join the parts first (gguf-split --merge)")
    table = []
    for _ in range(tensor_count):
        name = cursor.string()
        dimensions = cursor.numbers("Q", cursor.number("I"))
        kind, offset = cursor.numbers("I", 1)[0], cursor.number("Q")
        table.append((name, tuple(reversed(dimensions)), kind, offset))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    data_start = -(-cursor.at // alignment) * alignment
    tensors = [_gguf_tensor(*entry, data_start) for entry in table]
    for tensor in tensors:
        if tensor.offset + tensor.nbytes > size:
            end = tensor.offset + tensor.nbytes
            raise ValueError(f"truncated: tensor {tensor.name} ends at byte {end}, the file has {size}")
    return GgufHeader(path, version, metadata, tensors)


def _gguf_tensor(name: str, shape: tuple[int, ...], kind: int, offset: int, data_start: int) -> TensorInfo:
    if kind not in GGML_TYPES:
        raise ValueError(f"tensor {name} has unknown GGML type {kind}")
    type_name, block, block_bytes = GGML_TYPES[kind]
    if shape and shape[-1] % block:
        raise ValueError(f"tensor {name} {type_name}{list(shape)}: rows are no multiple of {block}")
    return TensorInfo(name, shape, type_name, data_start + offset, math.prod(shape) // block * block_bytes)


# --- a GGUF header in Hugging Face words ---------------------------------------------------------------------------


def gguf_dtype(header: GgufHeader) -> str | None:
    """The dtype that the matrices have in the file: "float32", "float16", "bfloat16", or None if they are quantised."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    kinds = {tensor.type for tensor in header.tensors if len(tensor.shape) > 1}
    return names.get(kinds.pop()) if len(kinds) == 1 else None


def gguf_hf_config(header: GgufHeader) -> dict[str, Any]:
    """The file's metadata as a Hugging Face ``config.json`` would say it. Raises WeightsInvalid on a missing key."""
    arch = header.architecture
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}

    def get(key: str, default: Any = None) -> Any:
        return header.metadata.get(f"{arch}.{key}", default)

    def need(key: str) -> int:
        value = get(key)
        if not isinstance(value, int):
            raise WeightsInvalid(f"{header.path}: metadata {arch}.{key} is {'missing' if value is None else value!r}")
        return value

    if "token_embd.weight" not in shapes:
        raise WeightsInvalid(f"{header.path}: tensor token_embd.weight is missing: no language model")
    hidden, heads = need("embedding_length"), need("attention.head_count")
    if heads < 1:
        raise WeightsInvalid(f"{header.path}: metadata {arch}.attention.head_count is {heads}")
    head_dim = get("attention.key_length") or hidden // heads
    rope_dim = get("rope.dimension_count", head_dim)
    config: dict[str, Any] = {
        "model_type": "mixtral" if arch == "llama" and get("expert_count", 0) else arch,
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
    tensor = next((tensor for tensor in header.tensors if tensor.name == "rope_freqs.weight"), None)
    if tensor is None:
        return None
    if tensor.type != "F32" or len(tensor.shape) != 1:
        raise WeightsInvalid(f"{header.path}: rope_freqs.weight is {tensor.type}{list(tensor.shape)}")
    with header.path.open("rb") as file:
        file.seek(tensor.offset)
        return list(struct.unpack(f"<{tensor.elements}f", file.read(tensor.nbytes)))


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


# --- where a model lies -----------------------------------------------------------------------------------------------


def locate_model(model_dir: str) -> Path:
    """Resolves `model_dir` to a directory in Hugging Face layout or to a .gguf file, absolute.

    Accepts a directory, a .gguf file, a directory that holds exactly one .gguf, and ``package:NAME``: the folder of
    an installed Python package, which is found without importing it. Raises ConfigInvalid.
    """
    if model_dir.startswith(PACKAGE_PREFIX):
        root = _package_folder(model_dir.removeprefix(PACKAGE_PREFIX))
        return _find_inside(root, model_dir, deep=True)
    path = Path(model_dir).expanduser().absolute()
    try:
        if path.is_dir():
            return _find_inside(path, model_dir, deep=False)
        if not path.exists():
            raise _invalid(f"{model_dir!r} does not exist")
    except OSError as error:
        raise _invalid(f"{model_dir!r} can't be read: {error.strerror}") from None
    if path.suffix != ".gguf":
        raise _invalid(f"{model_dir!r} is neither a directory nor a .gguf file")
    return path


def _package_folder(name: str) -> Path:
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name, re.ASCII):
        raise _invalid(f"'package:{name}' names no Python package")
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)  # of a top-level name: finds the file, executes nothing
    if spec is None or not spec.submodule_search_locations:
        raise _invalid(f"package {top!r} is not installed (pip install --no-deps {top.replace('_', '-')})")
    for location in spec.submodule_search_locations:
        folder = Path(location, *rest)
        if folder.is_dir():
            return folder
    raise _invalid(f"package {top!r} has no folder {'/'.join(rest)!r}")


def _find_inside(root: Path, shown: str, *, deep: bool) -> Path:
    """The one model in `root`: the folder itself, a .gguf file in it or (`deep`) either of them further down."""
    folders = [root, *(path for path in sorted(root.rglob("*")) if path.is_dir())] if deep else [root]
    candidates: list[Path] = []
    for folder in folders:
        ggufs = sorted(folder.glob("*.gguf"))
        # A config.json beside .gguf files and no other weights only describes them.
        weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
        if (folder / "config.json").is_file() and (weights or not ggufs):
            candidates.append(folder)
            continue
        candidates += ggufs
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise _invalid(f"{shown!r} holds neither a config.json nor a .gguf file ({root})")
    names = ", ".join(str(path.relative_to(root)) for path in candidates[:6])
    raise _invalid(f"{shown!r} holds {len(candidates)} models, name one of them: {names}")


def _invalid(message: str) -> ConfigInvalid:
    return ConfigInvalid([Problem("model_dir", message)])
