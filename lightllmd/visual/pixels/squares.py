"""Several squares of an image, as the image processors of LLaVA-NeXT and InternVL make them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from lightllmd.visual.pixels.square import resize

if TYPE_CHECKING:
    from lightllmd.architecture.vision.anyres import Anyres, AnyresLayout
    from lightllmd.architecture.vision.tiles import TiledLayout, Tiles


def anyres(geometry: Anyres, image: Image.Image, layout: AnyresLayout) -> np.ndarray:
    """uint8 ``[1 + rows * columns, square, square, 3]``: the whole image, then its squares, row by row. The image is in
    the middle of them, black around it."""
    size, (height, width) = geometry.square, layout.resized
    canvas = Image.new("RGB", (layout.columns * size, layout.rows * size))
    middle = (canvas.width - width) // 2, (canvas.height - height) // 2
    canvas.paste(resize(image, width, height, geometry.resample), middle)
    whole = np.asarray(resize(image, size, size, geometry.resample))
    return np.concatenate([whole[None], cut(canvas, layout.rows, layout.columns)])


def tiled(geometry: Tiles, image: Image.Image, layout: TiledLayout) -> np.ndarray:
    """uint8 ``[tiles, square, square, 3]``: the tiles, row by row, then the whole image where there are several."""
    size = geometry.square
    canvas = resize(image, layout.columns * size, layout.rows * size, geometry.resample)
    squares = cut(canvas, layout.rows, layout.columns)
    if layout.tiles == len(squares):
        return squares
    return np.concatenate([squares, np.asarray(resize(image, size, size, geometry.resample))[None]])


def cut(image: Image.Image, rows: int, columns: int) -> np.ndarray:
    """uint8 ``[rows * columns, height, width, 3]``, row by row."""
    height, width = image.height // rows, image.width // columns
    pixels = np.asarray(image).reshape(rows, height, columns, width, 3)
    return pixels.swapaxes(1, 2).reshape(rows * columns, height, width, 3)
