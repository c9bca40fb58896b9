"""Llama (``model_type = "llama"``): RMS norm, rotary positions, grouped queries, gated MLP; Llama 1 to 3, SmolLM2 …"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightllmd.architecture.entries import dimension, invalid, not_built, number, switch, word
from lightllmd.architecture.family import Family, Gguf
from lightllmd.architecture.rotary import rotary
from lightllmd.architecture.spec import Activation, DecoderSpec, GatedMlp, GroupedQuery, LayerSpec, RmsNorm
from lightllmd.errors import show

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
NAMES = {
    "embed": "model.embed_tokens",
    "attention_norm": "model.layers.{layer}.input_layernorm",
    "q_norm": "model.layers.{layer}.self_attn.q_norm",
    "k_norm": "model.layers.{layer}.self_attn.k_norm",
    "q": "model.layers.{layer}.self_attn.q_proj",
    "k": "model.layers.{layer}.self_attn.k_proj",
    "v": "model.layers.{layer}.self_attn.v_proj",
    "attention_out": "model.layers.{layer}.self_attn.o_proj",
    "feed_forward_norm": "model.layers.{layer}.post_attention_layernorm",
    "gate": "model.layers.{layer}.mlp.gate_proj",
    "up": "model.layers.{layer}.mlp.up_proj",
    "down": "model.layers.{layer}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
ROTARY_TABLES = r"(.*\.)?rotary_emb\.inv_freq"  # checkpoints of 2023 store the rotary frequencies
GGUF_NAMES = {
    "embed": "token_embd",
    "attention_norm": "blk.{layer}.attn_norm",
    "q_norm": "blk.{layer}.attn_q_norm",
    "k_norm": "blk.{layer}.attn_k_norm",
    "q": "blk.{layer}.attn_q",
    "k": "blk.{layer}.attn_k",
    "v": "blk.{layer}.attn_v",
    "attention_out": "blk.{layer}.attn_output",
    "feed_forward_norm": "blk.{layer}.ffn_norm",
    "gate": "blk.{layer}.ffn_gate",
    "up": "blk.{layer}.ffn_up",
    "down": "blk.{layer}.ffn_down",
    "norm": "output_norm",
    "head": "output",
}


def attention(config: Mapping[str, Any]) -> GroupedQuery:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    hidden, heads = dimension(config, "hidden_size"), dimension(config, "num_attention_heads")
    kv_heads = dimension(config, "num_key_value_heads", heads)
    head_dim = dimension(config, "head_dim", hidden // heads)
    if heads % kv_heads:
        raise invalid(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise invalid(f"head_dim {head_dim} is odd, rotary positions need pairs")
    biased = switch(config, "attention_bias")
    return GroupedQuery(heads, kv_heads, head_dim, scale=head_dim**-0.5, qkv_bias=biased, out_bias=biased)


def feed_forward(config: Mapping[str, Any], activation_key: str = "hidden_act") -> GatedMlp:
    """`activation_key` names the config's entry of the activation. Raises ConfigInvalid."""
    activation = word(config, activation_key) or "silu"
    if activation not in ACTIVATIONS:
        raise not_built(f"{activation_key} {show(activation)} is not available yet ({', '.join(ACTIVATIONS)} are)")
    inner = dimension(config, "intermediate_size")
    return GatedMlp(inner, ACTIVATIONS[activation], switch(config, "mlp_bias"))


def decoder(config: Mapping[str, Any], attention: GroupedQuery, feed_forward: GatedMlp) -> DecoderSpec:
    """With the same `attention` and `feed_forward` in all layers. Raises ConfigInvalid."""
    layers = dimension(config, "num_hidden_layers")
    return DecoderSpec(
        hidden=dimension(config, "hidden_size"),
        vocab=dimension(config, "vocab_size"),
        layers=(LayerSpec(attention, feed_forward),) * layers,
        positions=rotary(config, attention.head_dim),
        norm=RmsNorm(number(config, "rms_norm_eps", 1e-6, most=1.0)),
        norm_placement="pre",
        tied=switch(config, "tie_word_embeddings"),
    )


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    return decoder(config, attention(config), feed_forward(config))


FAMILY = Family("llama", spec, NAMES, ROTARY_TABLES, Gguf(GGUF_NAMES, frozenset({"q", "k"}), "mixtral"))
