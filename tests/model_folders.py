"""Tiny checkpoints without torch that could be served: headers are real, weights are zeros."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from lightllmd.architecture.families import architecture_of

ITEM = {"F16": 2, "BF16": 2, "F32": 4}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 4096,
    "vocab_size": 100,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "</s>": 2}, "merges": []},
}


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (kind, shape) in tensors.items():
        end = at + math.prod(shape) * ITEM[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(at))


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor that the family of LLAMA wants, and the head, which a tied model may repeat."""
    architecture = architecture_of("llama", {**config, "tie_word_embeddings": False})
    return {part.name: part.shape for weight in architecture.weights for part in weight.stored}


def write_folder(folder: Path, kind: str = "BF16", tokenizer: Mapping[str, Any] | None = None, **config: Any) -> Path:
    """A Hugging Face directory; keywords override entries of config.json, which the tensors don't follow."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | config))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer or {})))
    write_safetensors(folder / "model.safetensors", {name: (kind, shape) for name, shape in shapes(LLAMA).items()})
    return folder


def fill(folder: Path, seed: int) -> None:
    """Weights of that seed in place of the ones that are there, of the same shapes."""
    file, draw = folder / "model.safetensors", np.random.default_rng(seed)
    save_file(
        {name: draw.normal(size=one.shape).astype(np.float32) for name, one in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
