"""Qwen2-VL (``model_type = "qwen2_vl"``): images of any size as grids of patches, positions in these grids (Wang et al.
2024, "Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightllmd.architecture.entries import dimension, invalid, number, table
from lightllmd.architecture.prefixes import PrefixChoices, Prefixes
from lightllmd.architecture.vision.family import VisionFamily
from lightllmd.architecture.vision.grid import grid_geometry
from lightllmd.architecture.vision.grid_vit import NAMES, sizes, weights
from lightllmd.architecture.vision.pixels import BICUBIC, CLIP_MEAN, CLIP_STD, PixelNorm, pixel_norm, resample
from lightllmd.architecture.vision.placeholder import Placeholder
from lightllmd.architecture.vision.spec import GridVitSpec, MergerSpec, VisionSpec
from lightllmd.architecture.vision.text import nested
from lightllmd.architecture.vision.vit import activation
from lightllmd.errors import show

# What the classes have where a config says nothing.
DEFAULTS = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
LEAST_PIXELS, MOST_PIXELS = 56 * 56, 28 * 28 * 1280  # of an image processor that names none
CLIP = PixelNorm(CLIP_MEAN, CLIP_STD)
MERGER_NAMES = {"merger.norm": "merger.ln_q", "merger.fc1": "merger.mlp.0", "merger.fc2": "merger.mlp.2"}
MLP_NAMES = {"up": "blocks.{layer}.mlp.fc1", "down": "blocks.{layer}.mlp.fc2"}
# As they are on the hub, and as transformers has the modules.
PREFIXES = PrefixChoices(
    base=("model.", "model.language_model."), tower=("visual.", "model.visual."), connector=("visual.", "model.visual.")
)
PROBES = ("patch_embed.proj.weight", "merger.ln_q.weight")
OWNED = r"(model\.)?visual\..*"
IGNORED = r"(model\.)?visual\.rotary_pos_emb\.inv_freq"


def spec(config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, prefixes: Prefixes) -> VisionSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    seen = vision_config(config, DEFAULTS)
    outputs = dimension(seen, "hidden_size")
    common = sizes(seen, "embed_dim")
    tower = GridVitSpec(
        **common,
        intermediate=int(common["hidden"] * number(seen, "mlp_ratio")),
        activation=activation(seen, "hidden_act"),
        norm="layer",
        gated=False,
        names={**NAMES, **MLP_NAMES},
        rope_base=rope_base(seen),
    )
    return grid_vision(config, preprocessor, prefixes, tower, merger(tower, outputs))


def merger(tower: GridVitSpec, outputs: int) -> MergerSpec:
    """Behind a tower without taps."""
    return MergerSpec(tower.hidden, tower.merge, outputs, tower.norm, 0, MERGER_NAMES)


def grid_vision(
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any] | None,
    prefixes: Prefixes,
    tower: GridVitSpec,
    connector: MergerSpec,
    least: int = LEAST_PIXELS,
    most: int = MOST_PIXELS,
    usual: PixelNorm = CLIP,
) -> VisionSpec:
    """`least` and `most` pixels and `usual`: of the image processor where it names none. Raises ConfigInvalid."""
    settings = preprocessor or {}
    outputs = dimension(text_part(config), "hidden_size")
    if connector.outputs != outputs:
        raise invalid(f"vision_config makes embeddings of {connector.outputs} elements, the decoder takes {outputs}")
    image, start, end = (
        token(config, key, at)
        for key, at in (("image_token_id", 151655), ("vision_start_token_id", 151652), ("vision_end_token_id", 151653))
    )
    return VisionSpec(
        tower=tower,
        connector=connector,
        out_hidden=outputs,
        geometry=grid_geometry(
            settings, tower.patch, tower.merge, tower.frames, least, most, resample(settings, BICUBIC)
        ),
        placeholder=Placeholder(
            "<|vision_start|><|image_pad|><|vision_end|>", image, (start,), (end,), ("<|vision_start|><|vision_end|>",)
        ),
        norm=pixel_norm(settings, usual),
        weights=tuple(weights(tower, connector, prefixes.tower)),
        deepstack=connector.taps,
        positions="grid",
    )


def vision_config(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Completed. Raises ConfigInvalid."""
    given = {key: value for key, value in table(config, "vision_config").items() if value is not None}
    if "in_chans" in given:  # as configs of 2024 have it
        given.setdefault("in_channels", given["in_chans"])
    return {**defaults, **given}


def rope_base(seen: Mapping[str, Any]) -> float:
    """Of the tower's rotary positions. Raises ConfigInvalid."""
    return number(table(seen, "rope_parameters"), "rope_theta", 10000.0, within="vision_config.rope_parameters")


def token(config: Mapping[str, Any], key: str, usual: int) -> int:
    """An id. Raises ConfigInvalid."""
    value = config.get(key)
    value = usual if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise invalid(f"{key} is {show(value)}, a token's id is needed")
    return value


def text_part(config: Mapping[str, Any], kind: str = "qwen2_vl_text") -> Mapping[str, Any]:
    """The decoder's config of this type, which on the hub is spread over `config` itself. Raises ConfigInvalid."""
    part = table(config, "text_config")
    if not part:
        part = {key: value for key, value in config.items() if key != "vision_config"}
    return nested({**config, "text_config": {**part, "model_type": kind}}, "text_config", windowed=True)


FAMILY = VisionFamily("qwen2_vl", spec, text_part, PREFIXES, PROBES, OWNED, IGNORED)
