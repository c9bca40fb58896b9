"""Gemma 3's decoder (``model_type = "gemma3_text"``): Gemma 2's norms and windows without caps, norms of query and key
heads, five layers with a window for one without, whose rotary positions are others (Gemma Team 2025, "Gemma 3 Technical
Report")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightllmd.architecture.entries import dimension, not_built, number, optional, switch, table
from lightllmd.architecture.families import gemma2, llama
from lightllmd.architecture.family import Family
from lightllmd.architecture.rotary import rope_words, rotary
from lightllmd.architecture.spec import DecoderSpec, LayerSpec, RmsNorm, Rotary

# What an entry is where config.json lacks it: what transformers' class has.
DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
PATTERN = 6  # layers up to the next one without a window
FULL_BASE, WINDOWED_BASE = 1e6, 1e4  # of the rotary positions


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    config = DEFAULTS | {key: value for key, value in config.items() if value is not None or key not in DEFAULTS}
    if switch(config, "use_bidirectional_attention"):
        raise not_built("use_bidirectional_attention: attention to later tokens is not available yet")
    full = replace(
        llama.attention(config),
        scale=number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        soft_cap=_cap(config, "attn_logit_softcapping"),
        qk_norm="head",
    )
    windowed = replace(full, window=optional(dimension, config, "sliding_window", 4096), rotary=1)
    kinds = {gemma2.WINDOWED: windowed, gemma2.FULL: full}
    feed_forward = replace(llama.feed_forward(config, "hidden_activation"), bias=False)
    of_full, of_windowed = rotaries(config, full.head_dim)
    plain = {**config, "rope_scaling": None, "rope_parameters": None}
    decoder = llama.decoder(plain, full, feed_forward)
    layers = len(decoder.layers)
    if config.get("layer_types") is None:
        pattern = dimension(config, "sliding_window_pattern", PATTERN)
        named = [gemma2.WINDOWED if layer % pattern else gemma2.FULL for layer in range(1, layers + 1)]
    else:
        named = gemma2.layer_kinds(config, layers)
    return replace(
        decoder,
        layers=tuple(LayerSpec(kinds[kind], feed_forward) for kind in named),
        positions=of_full,
        other_positions=(of_windowed,),
        norm=RmsNorm(decoder.norm.eps, offset=1.0),
        norm_placement="pre_post",
        embedding_scale=decoder.hidden**0.5,
        logit_soft_cap=_cap(config, "final_logit_softcapping"),
    )


def rotaries(config: Mapping[str, Any], head_dim: int) -> tuple[Rotary, Rotary]:
    """Of the layers without a window, which alone are stretched by ``rope_scaling``, and of those with one. Raises
    ConfigInvalid."""
    parameters = table(config, "rope_parameters")
    if gemma2.FULL in parameters or gemma2.WINDOWED in parameters:
        full, windowed = table(parameters, gemma2.FULL), table(parameters, gemma2.WINDOWED)
        full |= table(config, "rope_scaling")
    else:
        full, windowed = rope_words(config), {}
    full_base = number(config, "rope_theta", FULL_BASE)
    windowed_base = number(config, "rope_local_base_freq", WINDOWED_BASE)
    found = []
    for words, base in ((full, full_base), (windowed, windowed_base)):
        words = {"rope_theta": base} | {key: value for key, value in words.items() if value is not None}
        found.append(rotary({**config, "rope_scaling": None, "rope_parameters": words}, head_dim))
    if any(one.kind == "dynamic" for one in found):
        raise not_built("rope type 'dynamic' is not available yet for layers of two kinds")
    return found[0], found[1]


def _cap(config: Mapping[str, Any], key: str) -> float | None:
    return None if config.get(key) is None else number(config, key)


FAMILY = Family("gemma3_text", spec, gemma2.NAMES)
