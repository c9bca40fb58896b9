"""Towers that see squares: the tiles of all images of a batch as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightllmd.architecture.vision.layout import ImageLayout, PreparedImage
from lightllmd.architecture.vision.spec import MlpConnector, VisionSpec, VitSpec
from lightllmd.models.vision.connectors import Mlp
from lightllmd.models.vision.layers import Weights
from lightllmd.models.vision.vit import Vit


class Squares:
    """A `TowerWithConnector`."""

    def __init__(self, spec: VisionSpec, weights: Weights, device: torch.device) -> None:
        assert isinstance(spec.tower, VitSpec)
        assert isinstance(spec.connector, MlpConnector)
        self._spec, self._device = spec, device
        self._tower, self._connector = Vit(spec.tower, weights, spec.norm), Mlp(spec.connector, weights)

    def encode(self, prepared: Sequence[PreparedImage]) -> list[Tensor]:
        """See `ImageEncoder.encode`."""
        if not prepared:
            return []
        pixels = torch.from_numpy(np.concatenate([one.pixels for one in prepared]))
        embeddings = self._connector.embeddings(self._tower.features(pixels.to(self._device)))
        cut = embeddings.split([one.layout.tiles for one in prepared])
        return [self._arranged(tiles, one.layout)[None] for tiles, one in zip(cut, prepared, strict=True)]

    def _arranged(self, tiles: Tensor, layout: ImageLayout) -> Tensor:
        """``[tiles, tokens of a tile, out_hidden]`` -> ``[tokens, out_hidden]``."""
        return tiles.flatten(0, 1)
