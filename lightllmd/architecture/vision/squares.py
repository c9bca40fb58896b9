"""Images of which the tower sees one square each, whatever their size: LLaVA 1.5."""

from __future__ import annotations

from dataclasses import dataclass

from lightllmd.architecture.vision.layout import ImageLayout
from lightllmd.architecture.vision.pixels import Resizing


@dataclass(frozen=True)
class OneSquare:
    """A `Geometry`."""

    resizing: Resizing
    tokens: int  # of each image
    background: tuple[int, int, int] = (0, 0, 0)  # of what is padded

    def layout(self, width: int, height: int) -> ImageLayout:
        """See `Geometry.layout`."""
        return ImageLayout(self.tokens)

    @property
    def most(self) -> ImageLayout:
        """See `Geometry.most`."""
        return ImageLayout(self.tokens)
