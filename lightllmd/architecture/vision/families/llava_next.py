"""LLaVA 1.6 (``model_type = "llava_next"``): LLaVA over several squares of an image (Liu et al. 2024, "LLaVA-NeXT")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightllmd.architecture.entries import dimension, invalid, not_built
from lightllmd.architecture.prefixes import Prefixes
from lightllmd.architecture.vision.anyres import Anyres
from lightllmd.architecture.vision.connectors import mlp_weights
from lightllmd.architecture.vision.families import llava
from lightllmd.architecture.vision.family import VisionFamily
from lightllmd.architecture.vision.pixels import CLIP_MEAN, CLIP_STD, PixelNorm, Resizing, pixel_norm, resizing, side
from lightllmd.architecture.vision.placeholder import Placeholder
from lightllmd.architecture.vision.spec import VisionSpec, VitSpec
from lightllmd.architecture.vision.vit import vit_weights
from lightllmd.errors import show

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # where config.json names none
MOST_PINPOINTS, MOST_TILES = 1024, 1024
PROBES = (llava.PROBES[0], "image_newline")


def spec(config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, prefixes: Prefixes) -> VisionSpec:
    """Raises ConfigInvalid naming the key where the config is incomplete or asks for what isn't built."""
    seen, outputs = llava.tower_of(config), dimension(llava.text(config), "hidden_size")
    usual = Resizing(shortest=seen.image, crop=(seen.image, seen.image))
    return anyres_spec(config, preprocessor, prefixes, seen, outputs, usual, PINPOINTS, 32000)


def anyres_spec(
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any] | None,
    prefixes: Prefixes,
    seen: VitSpec,
    outputs: int,
    usual: Resizing,
    usual_pinpoints: list[list[int]],
    usual_token: int,
    most_squares: int | None = None,
) -> VisionSpec:
    """Of a model that cuts its images up so; `usual`: what its image processor does where its settings say nothing.
    Raises ConfigInvalid."""
    if seen.tokens != seen.side**2:
        raise not_built(
            f"vision_feature_select_strategy: {seen.tokens} features of a square can't be laid out as "
            f"{seen.side} x {seen.side}"
        )
    connector = llava.connector_of(config, seen, outputs, newline=True)
    settings = preprocessor or {}
    how = resizing(settings, usual)
    llava.require_square(how, seen)
    written = config.get("image_grid_pinpoints")
    pinpoints = _pinpoints(usual_pinpoints if written is None else written, seen)
    own = settings.get("image_grid_pinpoints")
    if own is not None and _pinpoints(own, seen) != pinpoints:
        raise invalid("image_grid_pinpoints of the image processor are not those of config.json")
    return VisionSpec(
        tower=seen,
        connector=connector,
        out_hidden=outputs,
        geometry=Anyres(seen.image, seen.side, pinpoints, how.resample, most_squares),
        placeholder=Placeholder("<image>", llava.image_token(config, usual_token)),
        norm=pixel_norm(settings, PixelNorm(CLIP_MEAN, CLIP_STD)),
        weights=(*vit_weights(seen, prefixes.tower), *mlp_weights(connector, prefixes.connector)),
    )


def _pinpoints(written: Any, seen: VitSpec) -> tuple[tuple[int, int], ...]:
    """Raises ConfigInvalid."""
    if not isinstance(written, list) or not 1 <= len(written) <= MOST_PINPOINTS:
        raise invalid(f"image_grid_pinpoints is {show(written)}, 1 to {MOST_PINPOINTS} resolutions are needed")
    found = []
    for one in written:
        if not isinstance(one, list | tuple) or len(one) != 2:
            raise invalid(f"image_grid_pinpoints has {show(one)}, pairs of height and width are needed")
        height, width = (side("image_grid_pinpoints", pixels) for pixels in one)
        if height % seen.image or width % seen.image or height * width > MOST_TILES * seen.image**2:
            raise not_built(
                f"image_grid_pinpoints has {height}x{width}, up to {MOST_TILES} whole squares of {seen.image} pixels "
                "are available"
            )
        found.append((height, width))
    return tuple(found)


FAMILY = VisionFamily("llava_next", spec, llava.text, llava.PREFIXES, PROBES, llava.OWNED, llava.IGNORED)
