"""transformers' Llama with the weights of a GGUF file, converted without any code of ours: the gguf package's own
reader and dequantisation. (transformers' GGUF loader would need the accelerate package.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load_gguf(path: Path, dtype: torch.dtype) -> Any:
    """A LlamaForCausalLM in evaluation mode; for files without rope scaling."""
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    heads, kv_heads = value("attention.head_count"), value("attention.head_count_kv")
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        weight = weight.reshape([int(extent) for extent in reversed(tensor.shape)])
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k"):  # llama.cpp keeps rotary pairs side by side
                count = heads if parts[2] == "attn_q" else kv_heads
                weight = weight.reshape(count, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
            name = f"model.layers.{parts[1]}.{BLOCK[parts[2]]}.{parts[3]}"
        else:
            name = f"{TOP[parts[0]]}.weight"
        state[name] = torch.from_numpy(np.array(weight, dtype=np.float32))
    tied = "lm_head.weight" not in state
    config = LlamaConfig(
        hidden_size=value("embedding_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=value("feed_forward_length"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_theta=value("rope.freq_base"),
        vocab_size=len(state["model.embed_tokens.weight"]),
        tie_word_embeddings=tied,
    )
    model, loaded = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    assert not any(loaded[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()
