"""Qwen3 (``model_type = "qwen3"``): Llama's decoder with an RMS norm over each query and key head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightllmd.models.families import llama
from lightllmd.models.spec import DecoderSpec

layout = llama.layout


def spec(config: dict[str, Any]) -> DecoderSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    return replace(llama.spec(config), qk_norm=True, mlp_bias=False)
