"""LLaVA 1.5 (``model_type = "llava"``): CLIP or SigLIP over one square of each image, two linears behind it (Liu et al.
2023, "Improved Baselines with Visual Instruction Tuning")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightllmd.architecture.entries import dimension, invalid, switch, table
from lightllmd.architecture.prefixes import PrefixChoices, Prefixes
from lightllmd.architecture.vision.connectors import mlp_weights
from lightllmd.architecture.vision.family import VisionFamily
from lightllmd.architecture.vision.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    PixelNorm,
    Resizing,
    pixel_norm,
    resizing,
)
from lightllmd.architecture.vision.placeholder import Placeholder
from lightllmd.architecture.vision.spec import MlpConnector, VisionSpec, VitSpec
from lightllmd.architecture.vision.squares import OneSquare
from lightllmd.architecture.vision.text import nested
from lightllmd.architecture.vision.vit import activation, reading, tower, vit_weights

NAMES = {
    "linear_1": "multi_modal_projector.linear_1",
    "linear_2": "multi_modal_projector.linear_2",
    "newline": "image_newline",
}
# As they are on the hub, as transformers 5 has them, and what lay between.
PREFIXES = PrefixChoices(
    base=("language_model.model.", "model.language_model.", "language_model."),
    head=("language_model.", ""),
    tower=(
        "vision_tower.vision_model.",
        "vision_tower.",
        "model.vision_tower.",
        "model.vision_tower.vision_model.",
    ),
    connector=("", "model."),
)
PROBES = ("embeddings.patch_embedding.weight", "multi_modal_projector.linear_1.weight")
OWNED = r"(model\.)?((vision_tower|multi_modal_projector)\..*|image_newline)"
# What is behind the features that are read: pooling, layers, and positions that are counted.
_UNREAD = r"(post_layernorm|head|encoder\.layers|embeddings\.position_ids)"
IGNORED = rf"(model\.)?vision_tower\.(vision_model\.)?{_UNREAD}.*"
# A ``vision_config`` that says nothing is of CLIP's large tower for 336 pixels.
CLIP_LARGE = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def spec(config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, prefixes: Prefixes) -> VisionSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    seen = tower_of(config)
    outputs = dimension(text(config), "hidden_size")
    connector = connector_of(config, seen, outputs)
    settings = preprocessor or {}
    how = resizing(settings, usual_resizing(settings, seen))
    require_square(how, seen)
    norm = pixel_norm(settings, usual_norm(settings, seen))
    return VisionSpec(
        tower=seen,
        connector=connector,
        out_hidden=outputs,
        geometry=OneSquare(how, seen.tokens, norm.background),
        placeholder=Placeholder("<image>", image_token(config, 32000)),
        norm=norm,
        weights=(*vit_weights(seen, prefixes.tower), *mlp_weights(connector, prefixes.connector)),
    )


def text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raises ConfigInvalid."""
    return nested(config, "text_config")


def tower_of(config: Mapping[str, Any]) -> VitSpec:
    """With what is read of it. Raises ConfigInvalid."""
    seen = table(config, "vision_config") or CLIP_LARGE
    return reading(
        tower(seen, "clip_vision_model"),
        config.get("vision_feature_layer", -2),
        config.get("vision_feature_select_strategy", "default"),
    )


def connector_of(config: Mapping[str, Any], seen: VitSpec, outputs: int, newline: bool = False) -> MlpConnector:
    """Raises ConfigInvalid."""
    return MlpConnector(
        inputs=seen.width,
        inner=outputs,
        outputs=outputs,
        activation=activation(config, "projector_hidden_act"),
        names=NAMES,
        bias=switch(config, "multimodal_projector_bias", True),
        newline=newline,
    )


def token_id(config: Mapping[str, Any], kind: str, usual: int) -> int:
    """Of the token of this kind, such as "image", by either name. Raises ConfigInvalid."""
    for key in (f"{kind}_token_index", f"{kind}_token_id"):
        value = config.get(key)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
                raise invalid(f"{key} is {value!r}, a token's id is needed")
            return value
    return usual


def image_token(config: Mapping[str, Any], usual: int) -> int:
    """Its id, by either name. Raises ConfigInvalid."""
    return token_id(config, "image", usual)


def is_siglip(settings: Mapping[str, Any], seen: VitSpec) -> bool:
    """Whether the image processor is SigLIP's, which has its own usual settings; where it says nothing, whether the
    tower is."""
    kind = settings.get("image_processor_type")
    return "siglip" in kind.lower() if isinstance(kind, str) else not seen.class_token


def usual_norm(settings: Mapping[str, Any], seen: VitSpec) -> PixelNorm:
    """Of the image processor where it names none."""
    return PixelNorm(HALF, HALF) if is_siglip(settings, seen) else PixelNorm(CLIP_MEAN, CLIP_STD)


def usual_resizing(settings: Mapping[str, Any], seen: VitSpec) -> Resizing:
    """Of the image processor where it says nothing; without settings for the tower's square."""
    if is_siglip(settings, seen):
        usual = 224 if settings else seen.image
        return Resizing(usual, usual)
    usual = 224 if settings else seen.image
    return Resizing(shortest=usual, crop=(usual, usual))


def require_square(how: Resizing, seen: VitSpec) -> None:
    """Raises ConfigInvalid where what is prepared is not what the tower sees."""
    if how.result != (seen.image, seen.image):
        made = "images of their own shapes" if how.result is None else f"images of {how.result[1]}x{how.result[0]}"
        raise invalid(f"the image processor makes {made} pixels, the vision tower takes {seen.image}x{seen.image}")


FAMILY = VisionFamily("llava", spec, text, PREFIXES, PROBES, OWNED, IGNORED)
