"""Qwen3 (``model_type = "qwen3"``): Llama's decoder with an RMS norm over each query and key head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightllmd.models.families import llama
from lightllmd.models.spec import DecoderSpec

HEAD_DIM = 128  # where config.json names none, whatever hidden size and heads are
layout = llama.layout


def spec(config: dict[str, Any]) -> DecoderSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    config = {**config, "head_dim": config.get("head_dim") or HEAD_DIM}
    return replace(llama.spec(config), qk_norm=True, mlp_bias=False)
