"""InternVL 2.5 and 3 as transformers has it (``model_type = "internvl"``): InternViT over tiles of an image, of whose
features four become one (Chen et al. 2024, "Expanding Performance Boundaries of Open-Source Multimodal Models")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightllmd.architecture.entries import dimension, invalid, not_built, number, switch, table, word
from lightllmd.architecture.prefixes import PrefixChoices, Prefixes
from lightllmd.architecture.vision.connectors import mlp_weights
from lightllmd.architecture.vision.families import llava
from lightllmd.architecture.vision.family import VisionFamily
from lightllmd.architecture.vision.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PixelNorm,
    height_width,
    pixel_norm,
    resample,
)
from lightllmd.architecture.vision.placeholder import Placeholder
from lightllmd.architecture.vision.spec import MlpConnector, VisionSpec, VitSpec
from lightllmd.architecture.vision.text import nested
from lightllmd.architecture.vision.tiles import Tiles
from lightllmd.architecture.vision.vit import activation, reading, vit, vit_weights
from lightllmd.errors import show

MOST_TILES = 256
BEGIN, END = "<img>", "</img>"
NAMES = {
    "norm": "multi_modal_projector.layer_norm",
    "linear_1": "multi_modal_projector.linear_1",
    "linear_2": "multi_modal_projector.linear_2",
}
VIT_NAMES = {
    "patch": "embeddings.patch_embeddings.projection",
    "class": "embeddings.cls_token",
    "position": "embeddings.position_embeddings",
    "norm1": "encoder.layer.{layer}.layernorm_before",
    "q": "encoder.layer.{layer}.attention.q_proj",
    "k": "encoder.layer.{layer}.attention.k_proj",
    "v": "encoder.layer.{layer}.attention.v_proj",
    "q_norm": "encoder.layer.{layer}.attention.q_norm",
    "k_norm": "encoder.layer.{layer}.attention.k_norm",
    "out": "encoder.layer.{layer}.attention.projection_layer",
    "scale1": "encoder.layer.{layer}.lambda_1",
    "norm2": "encoder.layer.{layer}.layernorm_after",
    "fc1": "encoder.layer.{layer}.mlp.fc1",
    "fc2": "encoder.layer.{layer}.mlp.fc2",
    "scale2": "encoder.layer.{layer}.lambda_2",
    "post_norm": "layernorm",
}
PREFIXES = PrefixChoices(
    base=("language_model.model.", "model.language_model."),
    head=("language_model.", ""),
    tower=("vision_tower.", "model.vision_tower."),
    connector=("", "model."),
)
PROBES = ("embeddings.cls_token", "multi_modal_projector.linear_1.weight")
OWNED = r"(model\.)?(vision_tower|multi_modal_projector)\..*"
IGNORED = r"(model\.)?vision_tower\.(embeddings\.mask_token|layernorm\.|encoder\.layer\.).*"
_VIT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}  # where config.json says nothing


def spec(config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, prefixes: Prefixes) -> VisionSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    settings = preprocessor or {}
    layer = config.get("vision_feature_layer", -1)
    if not isinstance(layer, int):
        raise not_built(f"vision_feature_layer {show(layer)}: features of several layers are not available yet")
    seen = reading(intern_vit(config), layer, config.get("vision_feature_select_strategy", "default"))
    seen = replace(seen, post_norm=seen.post_norm and layer == -1)
    times = shrink(config)
    outputs = dimension(text(config), "hidden_size")
    connector = MlpConnector(
        inputs=seen.width * times**2,
        inner=outputs,
        outputs=outputs,
        activation=activation(config, "projector_hidden_act"),
        names=NAMES,
        norm=True,
        shuffle=times,
    )
    require_squares(seen, times)
    size = settings.get("size")
    if size is not None and height_width("size", size) != (seen.image, seen.image):
        raise invalid(f"size of the image processor is {show(size)}, the vision tower takes {seen.image}x{seen.image}")
    usual = PixelNorm(CLIP_MEAN, CLIP_STD) if settings else PixelNorm(IMAGENET_MEAN, IMAGENET_STD)
    return VisionSpec(
        tower=seen,
        connector=connector,
        out_hidden=outputs,
        geometry=tiles(settings, "min_patches", "max_patches", seen, times, resample(settings, 3)),
        placeholder=Placeholder(
            "<IMG_CONTEXT>", llava.image_token(config, 151667), (BEGIN,), (END,), also=("<image>",)
        ),
        norm=pixel_norm(settings, usual),
        weights=(*vit_weights(seen, prefixes.tower), *mlp_weights(connector, prefixes.connector)),
    )


def text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raises ConfigInvalid."""
    tied = config.get("tie_word_embeddings")
    # True where it is missing, so that only a checkpoint without head says that it is.
    whole = config if tied is not None else {**config, "tie_word_embeddings": True}
    return nested(whole, "text_config", "qwen2")


def intern_vit(config: Mapping[str, Any]) -> VitSpec:
    """Of a ``vision_config``. Raises ConfigInvalid."""
    given = {key: value for key, value in table(config, "vision_config").items() if value is not None}
    seen = {**_VIT, **given}
    if (kind := word(seen, "model_type") or "internvl_vision") != "internvl_vision":
        raise invalid(f"vision towers of type {show(kind)} are not available yet in this family")
    if not switch(seen, "use_absolute_position_embeddings", True):
        raise not_built("use_absolute_position_embeddings = false is not available yet")
    return replace(
        intern_vit_of(seen, VIT_NAMES, switch(seen, "use_qk_norm"), switch(seen, "attention_bias")),
        post_norm=not switch(seen, "use_mean_pooling", True),
        qk_norm_eps=1e-6,
    )


def intern_vit_of(config: Mapping[str, Any], names: Mapping[str, str], qk_norm: bool, qkv_bias: bool) -> VitSpec:
    """What both forms say alike. Raises ConfigInvalid."""
    norm = word(config, "norm_type") or "layer_norm"
    if norm not in ("layer_norm", "rms_norm"):
        raise not_built(f"norm_type {show(norm)} is not available yet (layer_norm and rms_norm are)")
    return replace(
        vit(config, names),
        norm="layer" if norm == "layer_norm" else "rms",
        patch_bias=True,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        layer_scale=True,
        leading=1,
    )


def shrink(config: Mapping[str, Any]) -> int:
    """How many features a side become one. Raises ConfigInvalid."""
    ratio = number(config, "downsample_ratio", 0.5, most=1.0)
    times = round(1 / ratio)
    if abs(times * ratio - 1) > 1e-6:
        raise not_built(f"downsample_ratio {ratio} is not available yet (1, 1/2, 1/3 … are)")
    return times


def require_squares(seen: VitSpec, times: int) -> None:
    """Raises ConfigInvalid where the features of a tile can't be made fewer."""
    if seen.tokens != seen.side**2:
        raise not_built(
            "vision_feature_select_strategy full is not available for this family: its features are squares"
        )
    if seen.side % times:
        raise invalid(f"downsample_ratio 1/{times} does not divide the {seen.side} patches a side of a tile")


def tiles(settings: Mapping[str, Any], fewest: str, largest: str, seen: VitSpec, times: int, filtering: int) -> Tiles:
    """`fewest`, `largest`: keys of `settings`. Raises ConfigInvalid."""
    least, most = tile_count(settings, fewest, 1), tile_count(settings, largest, 12)
    if least > most:
        raise invalid(f"{fewest} {least} is above {largest} {most}")
    return Tiles(seen.image, (seen.side // times) ** 2, least, most, filtering)


def tile_count(settings: Mapping[str, Any], key: str, usual: int) -> int:
    """Raises ConfigInvalid."""
    value = settings.get(key)
    value = usual if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_TILES:
        raise invalid(f"{key} is {show(value)}, an integer from 1 to {MOST_TILES} is needed")
    return value


FAMILY = VisionFamily("internvl", spec, text, PREFIXES, PROBES, OWNED, IGNORED)
