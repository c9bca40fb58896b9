"""Images of any size, resized as the image processor of Qwen2-VL does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightllmd.visual.pixels.square import resize

if TYPE_CHECKING:
    from PIL.Image import Image

    from lightllmd.architecture.vision.grid import GridGeometry
    from lightllmd.architecture.vision.layout import ImageLayout


def one_grid(geometry: GridGeometry, image: Image, layout: ImageLayout) -> np.ndarray:
    """uint8 ``[height, width, 3]``, whose sides are multiples of what becomes a token."""
    _, rows, columns = layout.grid
    return np.asarray(resize(image, columns * geometry.unit, rows * geometry.unit, geometry.resample))
