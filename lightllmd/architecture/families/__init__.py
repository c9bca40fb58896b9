"""Model families: one module for each Hugging Face ``model_type``, with a `FAMILY`. Nothing else knows these names."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from lightllmd.architecture.families import llama
from lightllmd.architecture.family import Architecture, Family
from lightllmd.architecture.heads import scored_model
from lightllmd.architecture.vision import families as vision
from lightllmd.errors import ConfigInvalid, Problem

_MODULES = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}


def family_of(model_type: str) -> Family:
    """Raises ConfigInvalid for a family that is not built."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigInvalid(
            [Problem("model_dir", f"models of type {model_type!r} are not available yet ({known} are)")]
        )
    return FAMILIES[model_type]


def architecture_of(model_type: str, config: Mapping[str, Any]) -> Architecture:
    """Of the model that a Hugging Face config describes; of one with vision its decoder. Raises ConfigInvalid."""
    sees = vision.family_of({**config, "model_type": model_type})
    if sees is not None:
        config = sees.text(config)
        family = family_of(config["model_type"])
        return Architecture(family, family.spec(config), prefixes=sees.prefixes.usual, beside=sees.owned)
    family, scored = family_of(model_type), scored_model(config)
    spec = family.spec(config)
    return Architecture(family, spec if scored is None else scored.decoder(spec), scored)


def has_llama_names(family: Family) -> bool:
    """Whether its checkpoints name their tensors as Llama's do."""
    return family.names == llama.NAMES


def gguf_model_type(architecture: str, experts: bool) -> str:
    """The ``model_type`` of a GGUF file that names its `architecture` so, with or without `experts`."""
    family = FAMILIES.get(architecture)
    other = family.gguf.experts if family is not None and family.gguf is not None and experts else None
    return other or architecture
