"""Images cut into squares of the best of several resolutions, with the whole image as one more square before them:
LLaVA-NeXT and LLaVA-OneVision (Liu et al. 2024, "LLaVA-NeXT"; Li et al. 2024, "LLaVA-OneVision")."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lightllmd.architecture.vision.layout import ImageLayout

LARGEST_RATIO = 1.1  # of a side to what it may be, beyond which features are made fewer


@dataclass(frozen=True)
class AnyresLayout(ImageLayout):
    """(height, width) of pixels and of features. The `base` features of the whole image come first, then those of the
    `rows` x `columns` squares as one picture: the middle of it, made smaller, a newline behind each row."""

    resized: tuple[int, int] = (0, 0)  # pixels of the image in the middle of the squares
    rows: int = 1  # squares
    columns: int = 1
    kept: tuple[int, int] = (0, 0)  # features in the middle that are no padding
    scaled: tuple[int, int] = (0, 0)  # features that they are made


@dataclass(frozen=True)
class Anyres:
    """A `Geometry`. `pinpoints`: resolutions (height, width) in pixels, multiples of `square`."""

    square: int  # pixels a side
    side: int  # features a side of a square
    pinpoints: tuple[tuple[int, int], ...]
    resample: int
    most_squares: int | None = None  # of features beside the whole image's; None: as many as there are

    def layout(self, width: int, height: int) -> AnyresLayout:
        """See `Geometry.layout`."""
        target = best_resolution(width, height, self.pinpoints)
        rows, columns = target[0] // self.square, target[1] // self.square
        kept = _without_padding(width, height, rows * self.side, columns * self.side)
        scaled = self._scaled(*kept)
        tokens = self.side**2 + scaled[0] * (scaled[1] + 1)
        return AnyresLayout(
            tokens,
            tiles=1 + rows * columns,
            resized=_fitted(width, height, *target),
            rows=rows,
            columns=columns,
            kept=kept,
            scaled=scaled,
        )

    @cached_property
    def most(self) -> ImageLayout:
        """See `Geometry.most`."""
        tiles, tokens = 0, 0
        for height, width in self.pinpoints:
            rows, columns = height // self.square, width // self.square
            features = rows * columns * self.side**2
            if self.most_squares is not None:
                features = min(features, math.floor(LARGEST_RATIO**2 * self.most_squares * self.side**2))
            tiles = max(tiles, rows * columns)
            tokens = max(tokens, features + rows * self.side)
        return ImageLayout(self.side**2 + tokens, tiles=1 + tiles)

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        if self.most_squares is None:
            return height, width
        ratio = math.sqrt(height * width / (self.most_squares * self.side**2))
        return (int(height // ratio), int(width // ratio)) if ratio > LARGEST_RATIO else (height, width)


def best_resolution(width: int, height: int, resolutions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(height, width) of the one in which most of an image's pixels survive, of several the smallest."""

    def rank(one: tuple[int, int]) -> tuple[int, int]:
        scale = min(one[1] / width, one[0] / height)
        survive = min(int(width * scale) * int(height * scale), width * height)
        return -survive, one[0] * one[1] - survive

    return min(resolutions, key=rank)  # the first of equal ones


def _fitted(width: int, height: int, most_height: int, most_width: int) -> tuple[int, int]:
    """(height, width) of the image as large as it can be there."""
    across, down = most_width / width, most_height / height
    if across < down:
        return min(math.ceil(height * across), most_height), most_width
    return most_height, min(math.ceil(width * down), most_width)


def _without_padding(width: int, height: int, rows: int, columns: int) -> tuple[int, int]:
    """(rows, columns) of features that are not of the padding, of the image in the middle of so many."""
    if width / height > columns / rows:
        inner = int(round(height * (columns / width), 7))
        return rows - (rows - inner) // 2 * 2, columns
    inner = int(round(width * (rows / height), 7))
    return rows, columns - (columns - inner) // 2 * 2
