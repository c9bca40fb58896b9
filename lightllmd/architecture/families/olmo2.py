"""OLMo 2 (``model_type = "olmo2"``): Llama's decoder with its norms behind the blocks instead of before them, and
norms over all query heads and over all key heads (OLMo Team 2024, "2 OLMo 2 Furious")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightllmd.architecture.families import llama
from lightllmd.architecture.family import Family
from lightllmd.architecture.spec import DecoderSpec

EPSILON = 1e-5  # of the norms, where config.json names none
NAMES = {
    **llama.NAMES,
    "attention_post_norm": "model.layers.{layer}.post_attention_layernorm",
    "feed_forward_post_norm": "model.layers.{layer}.post_feedforward_layernorm",
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    config = {"rms_norm_eps": EPSILON, **config}
    attention = replace(llama.attention(config), qk_norm="projection")
    decoder = llama.decoder(config, attention, replace(llama.feed_forward(config), bias=False))
    return replace(decoder, norm_placement="post")


FAMILY = Family("olmo2", spec, NAMES)
