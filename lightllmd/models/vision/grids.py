"""Towers that see the patches of images of any size: those of all images of a batch, packed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightllmd.architecture.vision.layout import PreparedImage
from lightllmd.architecture.vision.spec import GridVitSpec, MergerSpec, VisionSpec
from lightllmd.models.vision.grid_vit import GridVit, Merger
from lightllmd.models.vision.layers import Weights, normalised


class Grids:
    """A `TowerWithConnector`."""

    def __init__(self, spec: VisionSpec, weights: Weights, device: torch.device) -> None:
        assert isinstance(spec.tower, GridVitSpec)
        assert isinstance(spec.connector, MergerSpec)
        self._spec, self._tower, self._device = spec, spec.tower, device
        self._vit, self._merger = GridVit(spec.tower, weights), Merger(spec.connector, weights)

    def encode(self, prepared: Sequence[PreparedImage]) -> list[Tensor]:
        """See `ImageEncoder.encode`."""
        # Images of as many tokens follow each other: their attention is computed together.
        order = sorted(range(len(prepared)), key=lambda index: -prepared[index].layout.tokens)
        if not order:
            return []
        patches = torch.cat([self._patches(prepared[index]) for index in order])
        made = self._merger.embeddings(
            self._vit.features(patches, [prepared[index].layout.grid[1:] for index in order])
        )
        cut = made.split([prepared[index].layout.tokens for index in order], 1)
        found = dict(zip(order, cut, strict=True))
        return [found[index] for index in range(len(prepared))]

    def _patches(self, one: PreparedImage) -> Tensor:
        """``[patches, 3 * frames * patch * patch]``, those of a token one behind the other, colours first, as the
        weights of a convolution have them."""
        spec, (_, rows, columns) = self._tower, one.layout.grid
        pixels = torch.tensor(one.pixels).to(self._device)
        cut = normalised(pixels, self._spec.norm, self._vit.dtype).view(
            rows, spec.merge, spec.patch, columns, spec.merge, spec.patch, 3
        )
        cut = cut.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, 1, spec.patch**2)
        return cut.expand(-1, 3, spec.frames, -1).flatten(1)
