"""Qwen3 (``model_type = "qwen3"``): Llama's decoder with an RMS norm over each query and key head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightllmd.architecture.families import llama
from lightllmd.architecture.family import Family, Gguf
from lightllmd.architecture.spec import DecoderSpec

HEAD_DIM = 128  # where config.json names none, whatever hidden size and heads are


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    config = {**config, "head_dim": config.get("head_dim") or HEAD_DIM}
    attention = replace(llama.attention(config), qk_norm="head")
    return llama.decoder(config, attention, replace(llama.feed_forward(config), bias=False))


FAMILY = Family("qwen3", spec, llama.NAMES, llama.ROTARY_TABLES, Gguf(llama.GGUF_NAMES))
