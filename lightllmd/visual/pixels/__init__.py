"""Pixels as each family's own processor makes them: pillow and numpy, in any process; no torch.

What comes out are bytes that were resized, padded and cut. They are normalised on the device (`VisionSpec.norm`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightllmd.architecture.vision.anyres import Anyres
from lightllmd.architecture.vision.grid import GridGeometry
from lightllmd.architecture.vision.layout import PreparedImage
from lightllmd.architecture.vision.spec import VisionSpec
from lightllmd.architecture.vision.squares import OneSquare
from lightllmd.architecture.vision.tiles import Tiles
from lightllmd.visual.pixels.grid import one_grid
from lightllmd.visual.pixels.square import one_square
from lightllmd.visual.pixels.squares import anyres, tiled

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

# By the kind of geometry: uint8 pixels of an image, as the tower takes them.
MAKERS: dict[type, Callable[[Any, Image, Any], np.ndarray]] = {
    OneSquare: one_square,
    Anyres: anyres,
    Tiles: tiled,
    GridGeometry: one_grid,
}


def prepare(spec: VisionSpec, image: Image) -> PreparedImage:
    """Of an image in mode RGB."""
    geometry = spec.geometry
    layout = geometry.layout(image.width, image.height)
    return PreparedImage(MAKERS[type(geometry)](geometry, image, layout), layout)
