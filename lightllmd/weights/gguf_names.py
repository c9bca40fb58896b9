"""llama.cpp's names of tensors as Hugging Face's. No torch."""

from __future__ import annotations

import re

from lightllmd.weights.gguf_header import ROPE_FREQUENCIES, GgufHeader
from lightllmd.weights.headers import TensorInfo

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


def hugging_face_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; unknown names stay."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in BLOCK:
        return f"model.layers.{match[1]}.{BLOCK[match[2]]}.{match[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{TOP[stem]}.{kind}" if stem in TOP else name


def hugging_face_tensors(header: GgufHeader) -> dict[str, TensorInfo]:
    """The weights by their Hugging Face names."""
    return {hugging_face_name(tensor.name): tensor for tensor in header.tensors if tensor.name != ROPE_FREQUENCIES}
