"""InternVL 2, 2.5 and 3 as they were published (``model_type = "internvl_chat"``): InternViT over tiles of an image, of
whose features four become one, and InternLM2, Llama, Qwen2 or Qwen3 (Chen et al. 2023, "InternVL", and later)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightllmd.architecture.entries import dimension, not_built, switch, table, word
from lightllmd.architecture.prefixes import PrefixChoices, Prefixes
from lightllmd.architecture.vision.connectors import mlp_weights
from lightllmd.architecture.vision.families import internvl
from lightllmd.architecture.vision.family import VisionFamily
from lightllmd.architecture.vision.pixels import IMAGENET_MEAN, IMAGENET_STD, PixelNorm, pixel_norm, resample, side
from lightllmd.architecture.vision.placeholder import Placeholder
from lightllmd.architecture.vision.spec import MlpConnector, VisionSpec, VitSpec
from lightllmd.architecture.vision.text import nested
from lightllmd.architecture.vision.vit import reading, vit_weights
from lightllmd.errors import show

NAMES = {"norm": "mlp1.0", "linear_1": "mlp1.1", "linear_2": "mlp1.3"}
VIT_NAMES = {
    "patch": "embeddings.patch_embedding",
    "class": "embeddings.class_embedding",
    "position": "embeddings.position_embedding",
    "norm1": "encoder.layers.{layer}.norm1",
    "qkv": "encoder.layers.{layer}.attn.qkv",
    "q_norm": "encoder.layers.{layer}.attn.q_norm",
    "k_norm": "encoder.layers.{layer}.attn.k_norm",
    "out": "encoder.layers.{layer}.attn.proj",
    "scale1": "encoder.layers.{layer}.ls1",
    "norm2": "encoder.layers.{layer}.norm2",
    "fc1": "encoder.layers.{layer}.mlp.fc1",
    "fc2": "encoder.layers.{layer}.mlp.fc2",
    "scale2": "encoder.layers.{layer}.ls2",
}
PREFIXES = PrefixChoices(
    base=("language_model.model.",), head=("language_model.",), tower=("vision_model.",), connector=("",)
)
PROBES = ("embeddings.class_embedding", "mlp1.1.weight")
OWNED = r"(vision_model|mlp1)\..*"
IGNORED = r"vision_model\.encoder\.layers\..*"
_VIT = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "norm_type": "rms_norm",
}  # where config.json says nothing


def spec(config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, prefixes: Prefixes) -> VisionSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    settings = preprocessor or {}
    seen = reading(intern_vit(config), config.get("select_layer", -1), "default")
    if len(seen.features) > 1:
        raise not_built("select_layer: features of several layers are not available yet")
    if (version := word(config, "ps_version") or "v1") != "v2":
        raise not_built(f"ps_version {show(version)} is not available yet (v2 is)")
    times = internvl.shrink(config)
    internvl.require_squares(seen, times)
    outputs = dimension(text(config), "hidden_size")
    connector = MlpConnector(
        inputs=seen.width * times**2,
        inner=outputs,
        outputs=outputs,
        activation="gelu",
        names=NAMES,
        norm=True,
        shuffle=times,
    )
    geometry = internvl.tiles(config, "min_dynamic_patch", "max_dynamic_patch", seen, times, resample(settings, 3))
    if not switch(config, "dynamic_image_size"):
        geometry = replace(geometry, fewest=1, largest=1)
    return VisionSpec(
        tower=seen,
        connector=connector,
        out_hidden=outputs,
        geometry=replace(geometry, thumbnail=switch(config, "use_thumbnail")),
        placeholder=Placeholder("<image>", "<IMG_CONTEXT>", (internvl.BEGIN,), (internvl.END,)),
        norm=pixel_norm(settings, PixelNorm(IMAGENET_MEAN, IMAGENET_STD)),
        weights=(*vit_weights(seen, prefixes.tower), *mlp_weights(connector, prefixes.connector)),
    )


def text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raises ConfigInvalid."""
    return nested(config, "llm_config")


def intern_vit(config: Mapping[str, Any]) -> VitSpec:
    """Of a ``vision_config``. Raises ConfigInvalid."""
    given = {key: value for key, value in table(config, "vision_config").items() if value is not None}
    seen = {**_VIT, **given}
    made = internvl.intern_vit_of(seen, VIT_NAMES, switch(seen, "qk_normalization", True), switch(seen, "qkv_bias"))
    forced = config.get("force_image_size")
    if forced is not None and side("force_image_size", forced) != made.image:
        raise not_built(f"force_image_size {forced} other than the vision tower's {made.image} is not available yet")
    return replace(made, fused_qkv=True, qk_norm_eps=made.norm_eps)


FAMILY = VisionFamily("internvl_chat", spec, text, PREFIXES, PROBES, OWNED, IGNORED)
