"""Qwen2.5-VL (``model_type = "qwen2_5_vl"``): Qwen2-VL with a tower whose attention stays in windows in most layers
(Bai et al. 2025, "Qwen2.5-VL Technical Report")."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from lightllmd.architecture.entries import dimension, invalid
from lightllmd.architecture.prefixes import Prefixes
from lightllmd.architecture.vision.families import qwen2_vl
from lightllmd.architecture.vision.family import VisionFamily
from lightllmd.architecture.vision.grid_vit import NAMES, layers_named, sizes
from lightllmd.architecture.vision.spec import GridVitSpec, VisionSpec
from lightllmd.architecture.vision.vit import activation

# What the classes have where a config says nothing.
DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
MLP_NAMES = {
    "gate": "blocks.{layer}.mlp.gate_proj",
    "up": "blocks.{layer}.mlp.up_proj",
    "down": "blocks.{layer}.mlp.down_proj",
}


def spec(config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, prefixes: Prefixes) -> VisionSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    seen = qwen2_vl.vision_config(config, DEFAULTS)
    common, pixels = sizes(seen, "hidden_size"), dimension(seen, "window_size")
    window = pixels // common["merge"] // common["patch"]
    if not window:
        raise invalid(f"vision_config: window_size {pixels} is smaller than what becomes a token")
    tower = GridVitSpec(
        **common,
        intermediate=dimension(seen, "intermediate_size"),
        activation=activation(seen, "hidden_act"),
        norm="rms",
        gated=True,
        names={**NAMES, **MLP_NAMES},
        window=window,
        whole=frozenset(layers_named(seen, "fullatt_block_indexes", common["layers"])),
        rope_base=qwen2_vl.rope_base(seen),
    )
    connector = qwen2_vl.merger(tower, dimension(seen, "out_hidden_size"))
    return qwen2_vl.grid_vision(config, preprocessor, prefixes, tower, connector)


FAMILY = VisionFamily(
    "qwen2_5_vl",
    spec,
    partial(qwen2_vl.text_part, kind="qwen2_5_vl_text"),
    qwen2_vl.PREFIXES,
    qwen2_vl.PROBES,
    qwen2_vl.OWNED,
    qwen2_vl.IGNORED,
)
