"""llama.cpp's names of tensors as Hugging Face's. No torch."""

from __future__ import annotations

import re

from lightllmd.architecture.family import Family
from lightllmd.errors import ConfigInvalid, Problem
from lightllmd.weights.gguf_header import ROPE_FREQUENCIES, GgufHeader
from lightllmd.weights.headers import TensorInfo


def hugging_face_tensors(header: GgufHeader, family: Family) -> dict[str, TensorInfo]:
    """The weights by their Hugging Face names. Raises ConfigInvalid for a family whose GGUF names are not known."""
    if family.gguf is None:
        fault = f"GGUF files of models of type {family.model_type} are not available yet; safetensors are"
        raise ConfigInvalid([Problem("model_dir", f"{header.path}: {fault}")])
    stems = {family.gguf.names[kind]: name for kind, name in family.names.items()}
    tensors = [tensor for tensor in header.tensors if tensor.name != ROPE_FREQUENCIES]
    return {_hugging_face_name(tensor.name, stems): tensor for tensor in tensors}


def _hugging_face_name(name: str, stems: dict[str, str]) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; unknown names stay."""
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        stem, layer, kind = f"blk.{{layer}}.{match[2]}", match[1], match[3]
    else:
        stem, _, kind = name.rpartition(".")
        layer = ""
    return f"{stems[stem].format(layer=layer)}.{kind}" if stem in stems else name
