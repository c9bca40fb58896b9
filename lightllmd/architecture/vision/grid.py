"""Images of any size, cut into a grid of patches: the geometry of the Qwen vision-language models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightllmd.architecture.entries import invalid, not_built, table
from lightllmd.architecture.vision.layout import ImageLayout
from lightllmd.errors import InvalidRequest, show

MOST_RATIO = 200  # of an image's longer side to its shorter one
MOST_PIXELS = 1 << 28


@dataclass(frozen=True)
class GridGeometry:
    """An image is resized so that both sides are multiples of a merged patch's, its ratio is about kept and it has at
    least `least_pixels` and at most `most_pixels`; each merged patch becomes a token."""

    patch: int  # pixels a side
    merge: int  # patches a side that become one token together
    least_pixels: int
    most_pixels: int
    resample: int  # pillow's number of the filter

    @property
    def unit(self) -> int:
        """Pixels a side of what becomes one token."""
        return self.patch * self.merge

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of what an image is resized to. Raises InvalidRequest for a strip."""
        ratio = max(width, height) / min(width, height)
        if ratio > MOST_RATIO:
            raise InvalidRequest(
                f"the image is {width} x {height} pixels: its longer side is {ratio:.0f} times its shorter one, this "
                f"model takes at most {MOST_RATIO} times"
            )
        unit = self.unit
        columns, rows = round(width / unit), round(height / unit)
        if rows * columns * unit * unit > self.most_pixels:
            smaller = math.sqrt((height * width) / self.most_pixels)
            rows, columns = (max(1, math.floor(side / smaller / unit)) for side in (height, width))
        elif rows * columns * unit * unit < self.least_pixels:
            larger = math.sqrt(self.least_pixels / (height * width))
            rows, columns = (math.ceil(side * larger / unit) for side in (height, width))
        return columns * unit, rows * unit

    def layout(self, width: int, height: int) -> ImageLayout:
        """See `layout.Geometry`. Raises InvalidRequest for a strip."""
        wide, high = self.resized(width, height)
        rows, columns = high // self.unit, wide // self.unit
        return ImageLayout(rows * columns, (1, rows, columns))

    @property
    def most(self) -> ImageLayout:
        """See `layout.Geometry`."""
        # Sides are rounded down where an image is large, and up where it is small; a strip has at least one row.
        large = max(self.most_pixels // self.unit**2, MOST_RATIO)
        sides = math.sqrt(self.least_pixels * MOST_RATIO) + math.sqrt(self.least_pixels / MOST_RATIO)
        small = math.floor(self.least_pixels / self.unit**2 + sides / self.unit + 1)
        tokens = max(large, small)
        return ImageLayout(tokens, (1, 1, tokens))


def grid_geometry(
    settings: Mapping[str, Any], patch: int, merge: int, temporal: int, least: int, most: int, resample: int
) -> GridGeometry:
    """As the image processor of Qwen2-VL reads its settings; `least` and `most`: pixels, where they say nothing.
    `patch`, `merge` and `temporal` are the tower's. Raises ConfigInvalid."""
    if settings.get("do_resize") not in (None, True):
        raise not_built("do_resize = false of an image processor is not available yet")
    for key, wanted in (("patch_size", patch), ("merge_size", merge), ("temporal_patch_size", temporal)):
        if (given := settings.get(key)) is not None and given != wanted:
            raise invalid(f"{key} of the image processor is {show(given)}, the tower's is {wanted}")
    size = table(settings, "size")
    least = _pixels(settings, size, "min_pixels", "shortest_edge", least)
    most = _pixels(settings, size, "max_pixels", "longest_edge", most)
    if least > most:
        raise invalid(f"min_pixels {least} of the image processor is above its max_pixels {most}")
    return GridGeometry(patch, merge, least, most, resample)


def _pixels(settings: Mapping[str, Any], size: Mapping[str, Any], key: str, edge: str, usual: int) -> int:
    """Checkpoints name them in one of three ways."""
    given = [place.get(name) for place, name in ((settings, key), (size, edge), (size, key))]
    value = next((one for one in given if one is not None), usual)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_PIXELS:
        raise invalid(f"{key} of the image processor is {show(value)}, an integer from 1 to {MOST_PIXELS} is needed")
    return value
