"""One square of an image, as CLIP's, SigLIP's and LLaVA's image processors make it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from lightllmd.architecture.vision.layout import ImageLayout
from lightllmd.architecture.vision.pixels import Resizing

if TYPE_CHECKING:
    from lightllmd.architecture.vision.squares import OneSquare


ROWS = 64  # of a padded image that exist at a time
MOST_PADDED = 1 << 25  # pixels of a square that all rows of a tall image are padded to


def one_square(geometry: OneSquare, image: Image.Image, layout: ImageLayout) -> np.ndarray:
    """uint8 ``[1, height, width, 3]``."""
    how = geometry.resizing
    if not how.padded:
        return np.asarray(resized(image, how))[None]
    width, height = (how.shortest,) * 2 if how.shortest else (how.width, how.height)
    square = padded_square(image, geometry.background, width, height, how.resample)
    return np.asarray(square if how.crop is None else _middle(square, square.size, how.crop, how.resample))[None]


def resized(image: Image.Image, how: Resizing) -> Image.Image:
    """As `how` has it, padding apart."""
    if not how.shortest:
        whole = how.width, how.height
    else:
        short, long = sorted(image.size)
        other = int(how.shortest * long / short)
        whole = (how.shortest, other) if image.width <= image.height else (other, how.shortest)
    if how.crop is None:
        return resize(image, *whole, how.resample)
    return _middle(image, whole, how.crop, how.resample)


def resize(image: Image.Image, width: int, height: int, resample: int) -> Image.Image:
    """To that size; as it is where it has it."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling(resample))


def _middle(image: Image.Image, whole: tuple[int, int], crop: tuple[int, int], resample: int) -> Image.Image:
    """The middle (height, width) of the image resized to `whole` (width, height), black where that is too small. Only
    this part of it is computed: the rest of a very long image would take any memory."""
    height, width = crop
    left, top = (whole[0] - width) // 2, (whole[1] - height) // 2
    if left >= 0 and top >= 0:
        across, down = image.width / whole[0], image.height / whole[1]
        box = left * across, top * down, (left + width) * across, (top + height) * down
        box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
        if whole == image.size:
            return image.crop((left, top, left + width, top + height))
        return image.resize((width, height), Image.Resampling(resample), box)
    # As numpy centres what it pads: of an odd rest the larger half is before the image.
    canvas = Image.new("RGB", (max(width, whole[0]), max(height, whole[1])))
    left, top = -((whole[0] - canvas.width) // 2), -((whole[1] - canvas.height) // 2)
    canvas.paste(resize(image, *whole, resample), (left, top))
    return _middle(canvas, canvas.size, crop, resample)


def padded_square(
    image: Image.Image, background: tuple[int, int, int], width: int, height: int, resample: int
) -> Image.Image:
    """Made square with bars of one colour beside it or above and below, then resized. The square of a long image would
    take any memory: pillow resizes rows, then columns, so that some rows of it suffice at a time. Of a very tall image
    the columns are resized first, which rounds otherwise: its rows are almost nothing but bars."""
    size = max(image.size)
    if image.size == (size, size):
        return resize(image, width, height, resample)
    left, top = (size - image.width) // 2, (size - image.height) // 2
    if image.height == size and size * size > MOST_PADDED:
        low = Image.new("RGB", (size, height), background)
        low.paste(resize(image, image.width, height, resample), (left, 0))
        return resize(low, width, height, resample)
    narrow = Image.new("RGB", (width, size), background)
    for row in range(0, image.height, ROWS):
        below = min(image.height, row + ROWS)
        rows = Image.new("RGB", (size, below - row), background)
        rows.paste(image.crop((0, row, image.width, below)), (left, 0))
        narrow.paste(resize(rows, width, below - row, resample), (0, top + row))
    return resize(narrow, width, height, resample)
