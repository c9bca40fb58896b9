"""Families of vision models: one module for each Hugging Face ``model_type``, with a `FAMILY`. Nothing else knows these
names."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from lightllmd.architecture.vision.family import VisionFamily

_MODULES = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
FAMILIES: dict[str, VisionFamily] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}


def family_of(config: Mapping[str, Any]) -> VisionFamily | None:
    """None where the config is of no vision model."""
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    return None if family is None or (family.sees is not None and not family.sees(config)) else family
