"""Gemma 3 with images (``model_type = "gemma3"``): SigLIP over one square of each image, the mean of each block of its
patches; the tokens of an image attend to each other (Gemma Team 2025, "Gemma 3 Technical Report")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from typing import Any

from lightllmd.architecture.entries import dimension, invalid, not_built, switch, table
from lightllmd.architecture.prefixes import Prefixes
from lightllmd.architecture.vision.connectors import pool_weights
from lightllmd.architecture.vision.families.llava import OWNED, PREFIXES, require_square, token_id
from lightllmd.architecture.vision.family import VisionFamily
from lightllmd.architecture.vision.pixels import BILINEAR, HALF, PixelNorm, Resizing, pixel_norm, resizing
from lightllmd.architecture.vision.placeholder import Placeholder
from lightllmd.architecture.vision.spec import PoolConnector, VisionSpec
from lightllmd.architecture.vision.squares import OneSquare
from lightllmd.architecture.vision.text import nested
from lightllmd.architecture.vision.vit import tower, vit_weights

NAMES = {
    "norm": "multi_modal_projector.mm_soft_emb_norm",
    "projection": "multi_modal_projector.mm_input_projection_weight",
}
PROBES = ("embeddings.patch_embedding.weight", "multi_modal_projector.mm_input_projection_weight")
IGNORED = r"(model\.)?vision_tower\.(vision_model\.)?(head|embeddings\.position_ids).*"
TOKENS = 256  # of an image


def spec(config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, prefixes: Prefixes) -> VisionSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    settings = preprocessor or {}
    if switch(settings, "do_pan_and_scan"):
        raise not_built("do_pan_and_scan of an image processor is not available yet")
    seen = replace(tower(table(config, "vision_config"), "siglip_vision_model"), post_norm=True)
    if seen.class_token:
        raise not_built("vision_config: only SigLIP's towers are available yet for this type of model")
    tokens = dimension(config, "mm_tokens_per_image", TOKENS)
    side = isqrt(tokens)
    if side * side != tokens or side > seen.side or seen.side // (seen.side // side) != side:
        raise invalid(f"mm_tokens_per_image is {tokens}, {seen.side} x {seen.side} patches do not make so many")
    connector = PoolConnector(
        inputs=seen.width,
        outputs=dimension(text(config), "hidden_size"),
        side=seen.side,
        block=seen.side // side,
        norm_eps=seen.norm_eps,
        names=NAMES,
    )
    usual = 224 if settings else seen.image
    how = resizing(settings, Resizing(usual, usual, resample=BILINEAR))
    require_square(how, seen)
    return VisionSpec(
        tower=seen,
        connector=connector,
        out_hidden=connector.outputs,
        geometry=OneSquare(how, tokens),
        placeholder=Placeholder(
            "<start_of_image>",
            token_id(config, "image", 262144),
            (token_id(config, "boi", 255999),),
            (token_id(config, "eoi", 256000),),
            around=("\n\n", "\n\n"),
        ),
        norm=pixel_norm(settings, PixelNorm(HALF, HALF)),
        weights=(*vit_weights(seen, prefixes.tower), *pool_weights(connector, prefixes.connector)),
        bidirectional=True,
    )


def text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Raises ConfigInvalid."""
    said = table(config, "text_config"), config
    untied = any(one.get("tie_word_embeddings") is False for one in said)
    return {**nested(config, "text_config", "gemma3_text"), "tie_word_embeddings": not untied}


FAMILY = VisionFamily("gemma3", spec, text, PREFIXES, PROBES, OWNED, IGNORED)
