"""Gemma 2 (``model_type = "gemma2"``): norms before and behind each block, capped logits, every other layer with a
sliding window, a scaled embedding (Gemma Team 2024, "Gemma 2: Improving Open Language Models at a Practical Size")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightllmd.architecture.entries import dimension, invalid, number, optional, switch
from lightllmd.architecture.families import llama
from lightllmd.architecture.family import Family
from lightllmd.architecture.spec import DecoderSpec, LayerSpec, RmsNorm
from lightllmd.errors import show

# What an entry is where config.json lacks it.
DEFAULTS = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
WINDOWED, FULL = "sliding_attention", "full_attention"
NAMES = {
    **llama.NAMES,
    "attention_post_norm": "model.layers.{layer}.post_attention_layernorm",
    "feed_forward_norm": "model.layers.{layer}.pre_feedforward_layernorm",
    "feed_forward_post_norm": "model.layers.{layer}.post_feedforward_layernorm",
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    config = DEFAULTS | {key: value for key, value in config.items() if value is not None or key not in DEFAULTS}
    if switch(config, "use_bidirectional_attention"):
        raise invalid("use_bidirectional_attention: attention to later tokens is not available yet")
    full = replace(
        llama.attention(config),
        scale=number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        soft_cap=optional(number, config, "attn_logit_softcapping", 50.0),
    )
    windowed = replace(full, window=optional(dimension, config, "sliding_window", 4096))
    feed_forward = replace(llama.feed_forward(config, "hidden_activation"), bias=False)
    decoder = llama.decoder(config, full, feed_forward)
    kinds = {WINDOWED: windowed, FULL: full}
    return replace(
        decoder,
        layers=tuple(LayerSpec(kinds[kind], feed_forward) for kind in layer_kinds(config, len(decoder.layers))),
        norm=RmsNorm(decoder.norm.eps, offset=1.0),
        norm_placement="pre_post",
        embedding_scale=decoder.hidden**0.5,
        logit_soft_cap=optional(number, config, "final_logit_softcapping", 30.0),
    )


def layer_kinds(config: Mapping[str, Any], layers: int) -> list[str]:
    """Of attention, layer by layer: as written, else every other one has a window, beginning with the first. Raises
    ConfigInvalid."""
    written = config.get("layer_types")
    if written is None:
        return [FULL if layer % 2 else WINDOWED for layer in range(layers)]
    if not isinstance(written, list) or any(kind not in (WINDOWED, FULL) for kind in written):
        raise invalid(f"layer_types is {show(written)}, a list of {WINDOWED} and {FULL} is needed")
    if len(written) != layers:
        raise invalid(f"layer_types has {len(written)} entries, num_hidden_layers is {layers}")
    return written


FAMILY = Family("gemma2", spec, NAMES)
