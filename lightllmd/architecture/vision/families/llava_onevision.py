"""LLaVA-OneVision (``model_type = "llava_onevision"``): LLaVA-NeXT's squares, fewer features of large images (Li et
al. 2024, "LLaVA-OneVision: Easy Visual Task Transfer")."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightllmd.architecture.entries import dimension, not_built, table
from lightllmd.architecture.prefixes import Prefixes
from lightllmd.architecture.vision.families import llava, llava_next
from lightllmd.architecture.vision.family import VisionFamily
from lightllmd.architecture.vision.pixels import Resizing
from lightllmd.architecture.vision.spec import VisionSpec
from lightllmd.architecture.vision.text import nested
from lightllmd.architecture.vision.vit import reading, tower
from lightllmd.errors import show

_SIDES = range(384, 2305, 384)
PINPOINTS = [[height, width] for height in _SIDES for width in _SIDES]  # where config.json names none
# A ``vision_config`` that says nothing is of SigLIP's shape-optimised tower without its last layer.
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "patch_size": 14,
    "image_size": 384,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
}


def spec(config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, prefixes: Prefixes) -> VisionSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    seen = reading(
        tower(table(config, "vision_config") or SIGLIP, "siglip_vision_model"),
        config.get("vision_feature_layer", -1),
        config.get("vision_feature_select_strategy", "full"),
    )
    ratio = config.get("vision_aspect_ratio", "anyres_max_9")
    most = re.fullmatch(r"anyres_max_([1-9]\d{0,3})", ratio) if isinstance(ratio, str) else None
    if most is None:
        raise not_built(f"vision_aspect_ratio {show(ratio)} is not available yet (anyres_max_1 to anyres_max_9999 are)")
    outputs, usual = dimension(text(config), "hidden_size"), Resizing(seen.image, seen.image)
    return llava_next.anyres_spec(config, preprocessor, prefixes, seen, outputs, usual, PINPOINTS, 151646, int(most[1]))


def text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raises ConfigInvalid."""
    return nested(config, "text_config", "qwen2")


FAMILY = VisionFamily("llava_onevision", spec, text, llava.PREFIXES, llava_next.PROBES, llava.OWNED, llava.IGNORED)
