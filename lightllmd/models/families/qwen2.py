"""Qwen2 and Qwen2.5 (``model_type = "qwen2"``): Llama's decoder with biases on q, k and v and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightllmd.models.families import llama
from lightllmd.models.spec import DecoderSpec

layout = llama.layout


def spec(config: dict[str, Any]) -> DecoderSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    return replace(llama.spec(config), qkv_bias=True, out_bias=False, mlp_bias=False)
