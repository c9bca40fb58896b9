"""What a family of vision models says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightllmd.architecture.prefixes import PrefixChoices, Prefixes
from lightllmd.architecture.vision.spec import VisionSpec

Spec = Callable[[Mapping[str, Any], Mapping[str, Any] | None, Prefixes], VisionSpec]


@dataclass(frozen=True)
class VisionFamily:
    """Models of one Hugging Face ``model_type``."""

    model_type: str
    spec: Spec  # of config.json, the image processor's settings and the names' prefixes; raises ConfigInvalid
    text: Callable[[Mapping[str, Any]], Mapping[str, Any]]  # the decoder's config, with its model_type
    prefixes: PrefixChoices
    probes: tuple[str, str]  # a tensor of the tower and one of what else there is, without their prefixes
    owned: str  # pattern of the names that are no part of the decoder
    # Pattern of those among them that are not needed, and that may be there.
    ignored: str = r"(?!)"
    # Which configs of this type are of such models; None: all.
    sees: Callable[[Mapping[str, Any]], bool] | None = None
