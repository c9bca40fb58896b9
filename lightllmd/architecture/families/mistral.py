"""Mistral (``model_type = "mistral"``): Llama's decoder, with a sliding window in the first release (Jiang et al. 2023,
"Mistral 7B")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightllmd.architecture.entries import dimension, optional
from lightllmd.architecture.families import llama
from lightllmd.architecture.family import Family
from lightllmd.architecture.spec import DecoderSpec

# What an entry is where config.json lacks it.
KV_HEADS, WINDOW = 8, 4096


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    kv_heads = config.get("num_key_value_heads")
    config = {**config, "num_key_value_heads": KV_HEADS if kv_heads is None else kv_heads}
    window = optional(dimension, config, "sliding_window", WINDOW)
    attention = replace(llama.attention(config), window=window, qkv_bias=False, out_bias=False)
    return llama.decoder(config, attention, replace(llama.feed_forward(config), bias=False))


FAMILY = Family("mistral", spec, llama.NAMES, llama.ROTARY_TABLES)
