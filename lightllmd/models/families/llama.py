"""Llama (``model_type = "llama"``): RMS norm, rotary positions, grouped queries, gated MLP; Llama 1 to 3, SmolLM2 …"""

from __future__ import annotations

import re
from typing import Any, Literal

from lightllmd.config.shape import dimension
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
    if activation not in ACTIVATIONS:
        raise _invalid(f"hidden_act {activation!r} is not available yet ({', '.join(ACTIVATIONS)} are)")
    return DecoderSpec(
        layers=dimension(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=dimension(config, "intermediate_size"),
        vocab=dimension(config, "vocab_size"),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_rope(config, head_dim),
        activation=ACTIVATIONS[activation],
        qkv_bias=bool(config.get("attention_bias", False)),
        out_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        tied=bool(config.get("tie_word_embeddings", False)),
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
    """Reads both spellings: ``rope_theta`` + ``rope_scaling``, and ``rope_parameters`` of transformers 5."""
    words = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = float(words.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = words.get("rope_type") or words.get("type") or "default"
    context = dimension(config, "max_position_embeddings", 2048)
    partial = words.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise _invalid(f"partial_rotary_factor {partial} is not available yet")

    def number(key: str) -> float:
        value = words.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise _invalid(f"rope_scaling.{key} is {value!r}, a positive number is needed for rope type {kind!r}")
        return float(value)

    if kind == "default":
        return RopeSpec("default", head_dim, base)
    if kind == "linear":
        return RopeSpec("linear", head_dim, base, number("factor"))
    if kind == "dynamic":
        return RopeSpec("dynamic", head_dim, base, number("factor"), context)
    if kind == "llama3":
        original = int(words.get("original_max_position_embeddings") or context)
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if high <= low:
            raise _invalid(f"rope_scaling.high_freq_factor {high} must be above low_freq_factor {low}")
        return RopeSpec("llama3", head_dim, base, number("factor"), original, low, high)
    divisors = words.get("long_factor")
    constant = kind == "longrope" and divisors == words.get("short_factor") and words.get("attention_factor") == 1.0
    if constant and isinstance(divisors, list) and len(divisors) == head_dim // 2:
        return RopeSpec("divided", head_dim, base, divisors=tuple(float(value) for value in divisors))
    raise _invalid(f"rope type {kind!r} is not available yet (default, linear, dynamic and llama3 are)")


def _invalid(message: str) -> ConfigInvalid:
    return ConfigInvalid([Problem("model_dir", f"the model's config: {message}")])
