"""The text part of Qwen2-VL (``model_type = "qwen2_vl_text"``): Qwen2 with positions in the grids of images (Wang et
al. 2024, "Qwen2-VL")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightllmd.architecture.entries import dimension, switch
from lightllmd.architecture.families import llama, qwen2
from lightllmd.architecture.family import Family
from lightllmd.architecture.rotary import grid_rotary
from lightllmd.architecture.spec import DecoderSpec, LayerSpec

# What an entry is where config.json lacks it.
DEFAULTS = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
WINDOW = 4096
SECTIONS = (16, 24, 24)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    given = {key: value for key, value in config.items() if value is not None}
    config = {**DEFAULTS, **given}
    # Positions of their own are read behind it: their type is no one's that `qwen2` knows.
    plain = {**config, "rope_scaling": None, "rope_parameters": None}
    decoder = qwen2.spec(plain)
    head_dim = decoder.layers[0].attention.head_dim
    return replace(decoder, layers=_windowed(config, decoder), positions=grid_rotary(config, head_dim, SECTIONS))


def _windowed(config: Mapping[str, Any], decoder: DecoderSpec) -> tuple[LayerSpec, ...]:
    """The last layers may have a sliding window."""
    if not switch(config, "use_sliding_window"):
        return decoder.layers
    whole = dimension(config, "max_window_layers", len(decoder.layers))
    window = dimension(config, "sliding_window", WINDOW)
    return tuple(
        replace(layer, attention=replace(layer.attention, window=window)) if number >= whole else layer
        for number, layer in enumerate(decoder.layers)
    )


FAMILY = Family("qwen2_vl_text", spec, llama.NAMES, llama.ROTARY_TABLES)
