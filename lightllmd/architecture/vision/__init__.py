"""What an image model is, beside its decoder: tower, connector, geometry of its images, their place in a prompt.

Torch-free and pure: api workers count the tokens of an image with it, plans are made from it, the visual worker
prepares pixels and builds the encoder from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightllmd.architecture.prefixes import Prefixes
from lightllmd.architecture.vision.families import family_of
from lightllmd.architecture.vision.spec import VisionSpec


def vision_of(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None, prefixes: Prefixes | None = None
) -> VisionSpec | None:
    """Of the model that a Hugging Face config describes; None where it has no vision.

    `preprocessor`: preprocessor_config.json, or the image processor's part of processor_config.json; None: as the
    family has it. `prefixes`: of its checkpoint's names; None: the usual ones. Raises ConfigInvalid, by name for what
    is not built.
    """
    family = family_of(config)
    if family is None:
        return None
    return family.spec(config, preprocessor, prefixes or family.prefixes.usual)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the decoder, with its ``model_type``: a part of a vision model's, else the config itself. Raises
    ConfigInvalid."""
    family = family_of(config)
    return config if family is None else family.text(config)
