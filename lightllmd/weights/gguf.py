"""Checkpoints in one GGUF file (llama.cpp), dequantised as they are read.

llama.cpp names tensors its own way, and its converter reorders the rows of q and k of Llama models so that a rotary
pair is adjacent; both are undone here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize
from torch import Tensor

from lightllmd.errors import WeightsInvalid
from lightllmd.weights.files import WeightFile
from lightllmd.weights.headers import TensorInfo, gguf_hf_config, read_gguf_header

# GGUF's block types that gguf.dequantize turns into floats.
READABLE = {
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS",
}  # fmt: skip
# Elements dequantised at a time: the temporaries of numpy's passes stay in the CPU's cache.
CHUNK_ELEMENTS = 256 * 1024

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FREQUENCIES = "rope_freqs.weight"  # part of the config: headers.gguf_hf_config


def hugging_face_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; unknown names stay."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in BLOCK:
        return f"model.layers.{match[1]}.{BLOCK[match[2]]}.{match[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{TOP[stem]}.{kind}" if stem in TOP else name


class GgufCheckpoint:
    """Raises WeightsInvalid for a damaged, truncated or missing file."""

    def __init__(self, file: str | os.PathLike[str]) -> None:
        try:
            header = read_gguf_header(file)
            config = gguf_hf_config(header)
        except OSError as error:
            raise WeightsInvalid(f"{file}: can't be read: {error.strerror}") from None
        self._file = os.fspath(file)
        self.tensors: dict[str, TensorInfo] = {
            hugging_face_name(tensor.name): tensor for tensor in header.tensors if tensor.name != ROPE_FREQUENCIES
        }
        self._rotated_heads = {}
        if header.architecture == "llama":
            self._rotated_heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def read(self, name: str, out: Tensor) -> Iterator[int]:
        info = self.tensors[name]
        if info.type not in READABLE:
            raise WeightsInvalid(f"tensor {name} ({info.name}) is of type {info.type}, which is not available yet")
        view = self._in_file_order(name, out)
        if len(info.shape) == 1:
            view = view.unsqueeze(0)
        units = view.shape[0]  # rows, or heads where those are reordered, or the whole of a vector
        unit_bytes = info.nbytes // units
        step = min(units, max(1, CHUNK_ELEMENTS * units // info.elements))
        stored = np.empty((step, unit_bytes), np.uint8)
        with WeightFile(self._file) as file:
            for first in range(0, units, step):
                target = view[first : first + step]
                chunk = stored[: len(target)]
                file.read(info.offset + first * unit_bytes, chunk.reshape(-1))
                values = dequantize(chunk, GGMLQuantizationType[info.type])
                target.copy_(torch.from_numpy(values).view(target.shape))
                yield chunk.nbytes

    def _in_file_order(self, name: str, out: Tensor) -> Tensor:
        """`out` seen in the order of the file's rows: as it is, or ``[heads, pair, half, …]`` of rotated heads."""
        for part, heads in self._rotated_heads.items():
            if f".{part}." in name:
                return out.unflatten(0, (heads, 2, -1)).transpose(1, 2)
        return out
