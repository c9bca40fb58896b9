"""Qwen2 and Qwen2.5 (``model_type = "qwen2"``): Llama's decoder with biases on q, k and v and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightllmd.architecture.families import llama
from lightllmd.architecture.family import Family, Gguf
from lightllmd.architecture.spec import DecoderSpec


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    attention = replace(llama.attention(config), qkv_bias=True, out_bias=False)
    return llama.decoder(config, attention, replace(llama.feed_forward(config), bias=False))


FAMILY = Family("qwen2", spec, llama.NAMES, llama.ROTARY_TABLES, Gguf(llama.GGUF_NAMES))
