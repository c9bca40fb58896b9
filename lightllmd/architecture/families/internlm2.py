"""InternLM2 and 2.5 (``model_type = "internlm2"``): Llama's decoder under names of its own. Queries, keys and values
are one tensor, in which each key head and value head follow the query heads that share them (Cai et al. 2024,
"InternLM2 Technical Report")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightllmd.architecture.entries import switch
from lightllmd.architecture.families import llama
from lightllmd.architecture.family import Family
from lightllmd.architecture.spec import DecoderSpec

NAMES = {
    "embed": "model.tok_embeddings",
    "attention_norm": "model.layers.{layer}.attention_norm",
    "qkv": "model.layers.{layer}.attention.wqkv",
    "attention_out": "model.layers.{layer}.attention.wo",
    "feed_forward_norm": "model.layers.{layer}.ffn_norm",
    "gate": "model.layers.{layer}.feed_forward.w1",
    "up": "model.layers.{layer}.feed_forward.w3",
    "down": "model.layers.{layer}.feed_forward.w2",
    "norm": "model.norm",
    "head": "output",
}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    biased = switch(config, "bias")
    attention = replace(llama.attention(config), qkv_bias=biased, out_bias=biased)
    return llama.decoder(config, attention, replace(llama.feed_forward(config), bias=False))


FAMILY = Family("internlm2", spec, NAMES, llama.ROTARY_TABLES)
