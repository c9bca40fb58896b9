"""Llama (``model_type = "llama"``): RMS norm, rotary positions, grouped queries, gated MLP; Llama 1 to 3, SmolLM2 …"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, Literal

from lightllmd.config.check import show
from lightllmd.config.shape import dimension, number, rope_words, switch
from lightllmd.errors import ConfigInvalid, Problem
from lightllmd.models.spec import DecoderSpec, RopeSpec
from lightllmd.weights.layout import Layout, Part, Target

ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh", "relu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def spec(config: dict[str, Any]) -> DecoderSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    hidden, heads = dimension(config, "hidden_size"), dimension(config, "num_attention_heads")
    kv_heads = dimension(config, "num_key_value_heads", heads)
    head_dim = dimension(config, "head_dim", hidden // heads)
    if heads % kv_heads:
        raise _invalid(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise _invalid(f"head_dim {head_dim} is odd, rotary positions need pairs")
    activation = config.get("hidden_act") or "silu"
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise _invalid(f"hidden_act {show(activation)} is not available yet ({', '.join(ACTIVATIONS)} are)")
    return DecoderSpec(
        layers=dimension(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=dimension(config, "intermediate_size"),
        vocab=dimension(config, "vocab_size"),
        norm_eps=number(config, "rms_norm_eps", 1e-6, most=1.0),
        rope=_rope(config, head_dim),
        activation=ACTIVATIONS[activation],
        qkv_bias=switch(config, "attention_bias"),
        out_bias=switch(config, "attention_bias"),
        mlp_bias=switch(config, "mlp_bias"),
        tied=switch(config, "tie_word_embeddings"),
    )


def layout(spec: DecoderSpec) -> Layout:
    """Checkpoint names; q, k and v are stacked to one product, gate and up to another."""
    targets = [Target("embed", (Part("model.embed_tokens.weight", (spec.vocab, spec.hidden)),))]
    for layer in range(spec.layers):
        targets += _layer(spec, layer)
    targets.append(Target("norm", (Part("model.norm.weight", (spec.hidden,)),)))
    if not spec.tied:
        targets.append(Target("head", (Part("lm_head.weight", (spec.vocab, spec.hidden)),)))
    # Checkpoints of 2023 store the rotary frequencies; tied ones may repeat the embedding as head.
    ignored = r"(.*\.)?rotary_emb\.inv_freq" + (r"|lm_head\.weight" if spec.tied else "")
    return Layout(tuple(targets), re.compile(ignored))


def _layer(spec: DecoderSpec, layer: int) -> list[Target]:
    prefix = f"model.layers.{layer}"
    q_rows, kv_rows = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = [("self_attn.q_proj", q_rows), ("self_attn.k_proj", kv_rows), ("self_attn.v_proj", kv_rows)]
    mlp = [("mlp.gate_proj", spec.intermediate), ("mlp.up_proj", spec.intermediate)]
    products = [
        ("qkv", attention, spec.hidden, spec.qkv_bias),
        ("out", [("self_attn.o_proj", spec.hidden)], q_rows, spec.out_bias),
        ("gate_up", mlp, spec.hidden, spec.mlp_bias),
        ("down", [("mlp.down_proj", spec.hidden)], spec.intermediate, spec.mlp_bias),
    ]
    targets = [
        Target(f"{layer}.input_norm", (Part(f"{prefix}.input_layernorm.weight", (spec.hidden,)),)),
        Target(f"{layer}.mlp_norm", (Part(f"{prefix}.post_attention_layernorm.weight", (spec.hidden,)),)),
    ]
    if spec.qk_norm:
        targets += [
            Target(f"{layer}.{name}", (Part(f"{prefix}.self_attn.{name}.weight", (spec.head_dim,)),))
            for name in ("q_norm", "k_norm")
        ]
    for key, sources, columns, biased in products:
        weights = tuple(Part(f"{prefix}.{name}.weight", (rows, columns)) for name, rows in sources)
        biases = tuple(Part(f"{prefix}.{name}.bias", (rows,)) for name, rows in sources) if biased else ()
        targets.append(Target(f"{layer}.{key}", weights, biases))
    return targets


def _rope(config: dict[str, Any], head_dim: int) -> RopeSpec:
    words = rope_words(config)
    base = number(words if words.get("rope_theta") is not None else config, "rope_theta", 10000.0)
    if base <= 1:
        raise _invalid(f"rope_theta is {base:g}, a number above 1 is needed")
    kind = words.get("rope_type") or words.get("type") or "default"
    context = dimension(config, "max_position_embeddings", 2048)
    for given in (words, config):
        if number(given, "partial_rotary_factor", 1.0) != 1.0:
            raise _invalid(f"partial_rotary_factor {given['partial_rotary_factor']} is not available yet")
    scaling = partial(number, words, within="rope_scaling")
    if kind == "default":
        return RopeSpec("default", head_dim, base)
    if kind == "linear":
        return RopeSpec("linear", head_dim, base, scaling("factor"))
    if kind == "dynamic":
        if head_dim <= 2:
            raise _invalid(f"head_dim {head_dim} is too small for rope type 'dynamic'")
        return RopeSpec("dynamic", head_dim, base, scaling("factor"), context)
    if kind == "llama3":
        original = dimension(words, "original_max_position_embeddings", context)
        low, high = scaling("low_freq_factor"), scaling("high_freq_factor")
        if high <= low:
            raise _invalid(f"rope_scaling.high_freq_factor {high} must be above low_freq_factor {low}")
        return RopeSpec("llama3", head_dim, base, scaling("factor"), original, low, high)
    divisors = words.get("long_factor")
    constant = kind == "longrope" and divisors == words.get("short_factor") and words.get("attention_factor") == 1.0
    if constant and isinstance(divisors, list) and len(divisors) == head_dim // 2:
        factors = tuple(number({"long_factor": one}, "long_factor", within="rope_scaling") for one in divisors)
        return RopeSpec("divided", head_dim, base, divisors=factors)
    raise _invalid(f"rope type {show(kind)} is not available yet (default, linear, dynamic and llama3 are)")


def _invalid(message: str) -> ConfigInvalid:
    return ConfigInvalid([Problem("model_dir", message)])
