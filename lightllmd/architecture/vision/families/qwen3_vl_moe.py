"""Qwen3-VL with experts (``model_type = "qwen3_vl_moe"``), which is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from lightllmd.architecture.entries import not_built
from lightllmd.architecture.vision.families import qwen2_vl, qwen3_vl
from lightllmd.architecture.vision.family import VisionFamily


def refused(config: Mapping[str, Any], *_: Any) -> NoReturn:
    """Raises ConfigInvalid."""
    raise not_built("models of type 'qwen3_vl_moe' are not available yet: their decoder has a mixture of experts")


FAMILY = VisionFamily(
    "qwen3_vl_moe", refused, refused, qwen3_vl.PREFIXES, qwen3_vl.PROBES, qwen2_vl.OWNED, qwen2_vl.IGNORED
)
