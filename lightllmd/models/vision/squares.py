"""Towers that see squares: the tiles of all images of a batch as one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from lightllmd.architecture.vision.anyres import AnyresLayout
from lightllmd.architecture.vision.layout import ImageLayout, PreparedImage
from lightllmd.architecture.vision.spec import VisionSpec, VitSpec
from lightllmd.models.vision.connectors import CONNECTORS
from lightllmd.models.vision.layers import Weights
from lightllmd.models.vision.replayed import Replayed
from lightllmd.models.vision.vit import Vit


class Squares:
    """A `TowerWithConnector`."""

    def __init__(self, spec: VisionSpec, weights: Weights, device: torch.device) -> None:
        assert isinstance(spec.tower, VitSpec)
        self._tower = Vit(spec.tower, weights, spec.norm)
        self._connector = CONNECTORS[type(spec.connector)](spec.connector, weights)
        self._embeddings: Callable[[Tensor], Tensor] = self._run
        if device.type == "cuda":
            with torch.inference_mode():
                self._embeddings = Replayed(self._run, spec.tower.image, device)

    def encode(self, prepared: Sequence[PreparedImage]) -> list[Tensor]:
        """See `ImageEncoder.encode`."""
        if not prepared:
            return []
        embeddings = self._embeddings(torch.from_numpy(np.concatenate([one.pixels for one in prepared])))
        cut = embeddings.split([one.layout.tiles for one in prepared])
        return [self._arranged(tiles, one.layout)[None] for tiles, one in zip(cut, prepared, strict=True)]

    def _run(self, pixels: Tensor) -> Tensor:
        """uint8 ``[tiles, image, image, 3]`` -> ``[tiles, tokens of a tile, out_hidden]``."""
        return self._connector.embeddings(self._tower.features(pixels))

    def _arranged(self, tiles: Tensor, layout: ImageLayout) -> Tensor:
        """``[tiles, tokens of a tile, out_hidden]`` -> ``[tokens, out_hidden]``."""
        if not isinstance(layout, AnyresLayout):
            return tiles.flatten(0, 1)
        assert self._connector.newline is not None
        rows = in_one(tiles[1:], layout)
        newlines = self._connector.newline.expand(len(rows), 1, -1)
        return torch.cat([tiles[0], torch.cat([rows, newlines], 1).flatten(0, 1)])


def in_one(squares: Tensor, layout: AnyresLayout) -> Tensor:
    """``[rows * columns, side * side, hidden]`` of the squares of an image -> ``[height, width, hidden]`` of the image,
    without its padding, as large as the layout has it."""
    tokens, hidden = squares.shape[1:]
    side = int(tokens**0.5)
    grid = squares.view(layout.rows, layout.columns, side, side, hidden).transpose(1, 2)
    whole = grid.reshape(layout.rows * side, layout.columns * side, hidden)
    height, width = layout.kept
    top, left = (whole.shape[0] - height) // 2, (whole.shape[1] - width) // 2
    kept = whole[top : top + height, left : left + width]
    if layout.scaled == layout.kept:
        return kept
    scaled = functional.interpolate(kept.permute(2, 0, 1)[None], layout.scaled, mode="bilinear")
    return scaled[0].permute(1, 2, 0)
