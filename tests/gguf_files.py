"""GGUF files of tiny models, as llama.cpp's converter would write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from tiny_models import tensors_of

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# 256 columns everywhere, so that each block type fits.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}


def llama_cpp_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order of llama.cpp's converter: element i of a head beside element i + half."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def random_rows(kind: str, columns: int, rows: int) -> np.ndarray:
    """Random bytes as rows of blocks, without those whose scales are no numbers: uint8 ``[rows or fewer, bytes]``."""
    block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    raw = np.random.default_rng(0).integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
    if block == 1:
        return raw
    with np.errstate(invalid="ignore"):
        return raw[np.isfinite(gguf.dequantize(raw, Kind[kind])).all(1)]


def write_gguf(
    path: Path,
    config: dict[str, Any],
    kind: Kind,
    rope_freqs: np.ndarray | None = None,
    parts: int = 0,
    others: Mapping[str, Kind] | None = None,
) -> Path:
    """The tiny model of `config` with its matrices stored as `kind`, but for those whose names hold a key of `others`;
    split after so many tensors, if asked."""
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=parts)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(config["vocab_size"])])
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    for name, tensor in tensors_of(config).items():
        weight = tensor.numpy()
        if architecture == "llama" and ".q_proj." in name:
            weight = llama_cpp_rows(weight, config["num_attention_heads"])
        if architecture == "llama" and ".k_proj." in name:
            weight = llama_cpp_rows(weight, config["num_key_value_heads"])
        own = next((other for part, other in (others or {}).items() if part in name), kind)
        stored = own if weight.ndim > 1 else Kind.F32
        writer.add_tensor(gguf_name(name), gguf.quantize(np.ascontiguousarray(weight), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name == "lm_head.weight":
        return "output.weight"
    if name in top:
        return top[name]
    _, _, layer, rest = name.split(".", 3)
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES.get(stem, stem)}.{kind}"
