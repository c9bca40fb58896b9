"""Tiny checkpoints without torch: headers are real, weights are zeros."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

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


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (kind, shape) in tensors.items():
        end = at + math.prod(shape) * ITEM[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(at))


@pytest.fixture
def hf_model(tmp_path: Path) -> Callable[..., Path]:
    """Makes a Hugging Face directory; keywords override entries of config.json."""

    def make(kind: str = "BF16", tokenizer: Mapping[str, Any] | None = None, **config: Any) -> Path:
        folder = tmp_path / "tiny-llama"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(LLAMA | config))
        (folder / "tokenizer.json").write_text("{}")
        (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer or {})))
        names = {"model.embed_tokens.weight": (100, 16), "model.norm.weight": (16,), "lm_head.weight": (100, 16)}
        write_safetensors(folder / "model.safetensors", {name: (kind, shape) for name, shape in names.items()})
        return folder

    return make
