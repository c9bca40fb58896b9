"""The text part of Qwen3-VL (``model_type = "qwen3_vl_text"``): Qwen3 with positions in the grids of images, whose
three numbers take turns among the frequencies (Bai et al. 2025, "Qwen3-VL")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightllmd.architecture.families import llama, qwen3
from lightllmd.architecture.family import Family
from lightllmd.architecture.rotary import grid_rotary
from lightllmd.architecture.spec import DecoderSpec

DEFAULTS = {"max_position_embeddings": 128000, "rope_theta": 5e5}  # where config.json lacks them
SECTIONS = (24, 20, 20)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    given = {key: value for key, value in config.items() if value is not None}
    config = {**DEFAULTS, **given}
    decoder = qwen3.spec({**config, "rope_scaling": None, "rope_parameters": None})
    head_dim = decoder.layers[0].attention.head_dim
    return replace(decoder, positions=grid_rotary(config, head_dim, SECTIONS, interleaved=True))


FAMILY = Family("qwen3_vl_text", spec, llama.NAMES, llama.ROTARY_TABLES)
