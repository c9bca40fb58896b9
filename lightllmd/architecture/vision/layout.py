"""How one image lies in a prompt, and what is prepared of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from numpy import ndarray

PLAIN_GRID = (1, 0, 0)  # of a layout whose tokens have positions as text has


@dataclass(frozen=True)
class ImageLayout:
    """Of an image of one size: what follows from its width and height alone."""

    tokens: int  # of the prompt; its embeddings are as many rows
    grid: tuple[int, int, int] = PLAIN_GRID  # (time, rows, columns) of the tokens, for positions in a grid
    tiles: int = 1  # squares that the tower sees, where it sees squares


class Geometry(Protocol):
    """How a family cuts its images up."""

    def layout(self, width: int, height: int) -> ImageLayout:
        """Of an image of so many pixels, at least 1 each. Pure, and quick for any size."""

    @property
    def most(self) -> ImageLayout:
        """A layout that is nowhere exceeded: no image has more tokens, nor more tiles."""


@dataclass(frozen=True)
class PreparedImage:
    """An image on its way to the tower: pixels as they were resized and cut, not yet normalised (`VisionSpec.norm`), so
    that a byte is carried for each."""

    pixels: ndarray  # uint8: ``[tiles, height, width, 3]`` where the tower sees squares
    layout: ImageLayout
