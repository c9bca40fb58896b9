"""Model families: one module per Hugging Face ``model_type``, found by that name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightllmd.errors import ConfigInvalid, Problem
from lightllmd.models.families import llama, qwen2, qwen3
from lightllmd.models.spec import DecoderSpec
from lightllmd.weights.layout import Layout


@dataclass(frozen=True)
class Family:
    spec: Callable[[dict[str, Any]], DecoderSpec]  # raises ConfigInvalid
    layout: Callable[[DecoderSpec], Layout]


FAMILIES = {
    "llama": Family(llama.spec, llama.layout),
    "qwen2": Family(qwen2.spec, qwen2.layout),
    "qwen3": Family(qwen3.spec, qwen3.layout),
}


def family_of(model_type: str) -> Family:
    """Raises ConfigInvalid for a family that is not built."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigInvalid(
            [Problem("model_dir", f"models of type {model_type!r} are not available yet ({known} are)")]
        )
    return FAMILIES[model_type]
