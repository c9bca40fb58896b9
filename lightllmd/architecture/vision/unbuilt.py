"""Models that see whose images are not served, by name. Their text may be, by transformers' or their own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightllmd.architecture.vision.families import family_of
from lightllmd.errors import show

# By model_type, and what of it is not built. Those without a tower in their config see, too.
_REASONS = {
    "internlmxcomposer2": "its linears have low-rank parts for the tokens of images alone",
    "phi3_v": "its tiles and the separators between their rows",
    "phi4_multimodal": "its linears have low-rank parts for images",
    "phi4mm": "its linears have low-rank parts for images",
}
_OF_TOWERS = {"qwen": "the decoder and the resampler of Qwen-VL"}  # where there is a tower
_XCOMPOSER = "InternLMXComposer"  # what its architectures begin with, whatever their type
# Entries of a config that describe a vision tower.
_TOWERS = ("vision_config", "vit_config", "visual", "vision_tower", "mm_vision_tower", "embd_layer")


def unbuilt(config: Mapping[str, Any]) -> str | None:
    """Why the images of a model that sees are not served; None where they are, or where it is a model of text."""
    if family_of(config) is not None:
        return None
    given, named = config.get("model_type"), config.get("architectures")
    kind = given if isinstance(given, str) else ""
    if isinstance(named, list) and any(isinstance(one, str) and one.startswith(_XCOMPOSER) for one in named):
        kind = "internlmxcomposer2"
    reason = _REASONS.get(kind)
    if reason is None:
        if not any(config.get(entry) for entry in _TOWERS):
            return None
        reason = _OF_TOWERS.get(kind)
    return f"images of models of type {show(kind)} are not available yet" + (f" ({reason})" if reason else "")
