"""Qwen3-VL (``model_type = "qwen3_vl"``): learnt positions that are stretched over each image beside the rotary ones,
and features of several layers of the tower for the first decoder layers (Bai et al. 2025, "Qwen3-VL")."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import isqrt
from typing import Any

from lightllmd.architecture.entries import dimension, invalid
from lightllmd.architecture.prefixes import PrefixChoices, Prefixes
from lightllmd.architecture.vision.families import qwen2_vl
from lightllmd.architecture.vision.family import VisionFamily
from lightllmd.architecture.vision.grid_vit import NAMES, layers_named, sizes
from lightllmd.architecture.vision.pixels import HALF, PixelNorm
from lightllmd.architecture.vision.spec import GridVitSpec, MergerSpec, VisionSpec
from lightllmd.architecture.vision.vit import activation
from lightllmd.errors import show

# What the classes have where a config says nothing.
DEFAULTS = {
    "depth": 27,
    "hidden_size": 1152,
    "hidden_act": "gelu_pytorch_tanh",
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
LEAST_PIXELS, MOST_PIXELS = 1 << 16, 1 << 24  # as its checkpoints have them
TOWER_NAMES = {
    **NAMES,
    "up": "blocks.{layer}.mlp.linear_fc1",
    "down": "blocks.{layer}.mlp.linear_fc2",
}
MERGER_NAMES = {
    "merger.norm": "merger.norm",
    "merger.fc1": "merger.linear_fc1",
    "merger.fc2": "merger.linear_fc2",
    "tap.norm": "deepstack_merger_list.{layer}.norm",
    "tap.fc1": "deepstack_merger_list.{layer}.linear_fc1",
    "tap.fc2": "deepstack_merger_list.{layer}.linear_fc2",
}
PREFIXES = PrefixChoices(
    base=("model.language_model.", "model."), tower=("model.visual.", "visual."), connector=("model.visual.", "visual.")
)
PROBES = ("patch_embed.proj.weight", "merger.norm.weight")


def spec(config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, prefixes: Prefixes) -> VisionSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    seen = qwen2_vl.vision_config(config, DEFAULTS)
    common, positions = sizes(seen, "hidden_size"), dimension(seen, "num_position_embeddings")
    if isqrt(positions) ** 2 != positions:
        raise invalid(f"vision_config: num_position_embeddings {positions} is no square number")
    taps = layers_named(seen, "deepstack_visual_indexes", common["layers"])
    if list(taps) != sorted(taps):
        raise invalid(f"vision_config: deepstack_visual_indexes {show(list(taps))} are not in order")
    layers = dimension(text(config), "num_hidden_layers")
    if len(taps) > layers:
        raise invalid(f"vision_config: there are {len(taps)} deepstack_visual_indexes, the decoder has {layers} layers")
    tower = GridVitSpec(
        **common,
        intermediate=dimension(seen, "intermediate_size"),
        activation=activation(seen, "hidden_act"),
        norm="layer",
        gated=False,
        names=TOWER_NAMES,
        patch_bias=True,
        table=isqrt(positions),
        taps=taps,
        rope_base=qwen2_vl.rope_base(seen),
    )
    outputs = dimension(seen, "out_hidden_size")
    connector = MergerSpec(tower.hidden, tower.merge, outputs, tower.norm, len(taps), MERGER_NAMES)
    if preprocessor:
        return qwen2_vl.grid_vision(config, preprocessor, prefixes, tower, connector)
    usual = PixelNorm(HALF, HALF)
    return qwen2_vl.grid_vision(config, None, prefixes, tower, connector, LEAST_PIXELS, MOST_PIXELS, usual)


text = partial(qwen2_vl.text_part, kind="qwen3_vl_text")
FAMILY = VisionFamily("qwen3_vl", spec, text, PREFIXES, PROBES, qwen2_vl.OWNED, qwen2_vl.IGNORED)
