"""The encoder: tower and connector of one model, from prepared images to image embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightllmd.architecture.vision.layout import PreparedImage
from lightllmd.architecture.vision.spec import GridVitSpec, VisionSpec, VitSpec
from lightllmd.models.vision.grids import Grids
from lightllmd.models.vision.layers import Weights, held
from lightllmd.models.vision.squares import Squares
from lightllmd.weights.loaded import LoadedWeight


class TowerWithConnector(Protocol):
    """What a kind of tower brings."""

    def encode(self, prepared: Sequence[PreparedImage]) -> list[Tensor]:
        """See `ImageEncoder.encode`."""


class Maker(Protocol):
    """Makes one with the weights of a `VisionSpec`."""

    def __call__(self, spec: VisionSpec, weights: Weights, device: torch.device) -> TowerWithConnector: ...


# By the kind of tower that the specification names.
TOWERS: dict[type, Maker] = {VitSpec: Squares, GridVitSpec: Grids}


class ImageEncoder:
    """Takes over the weights that `weights` yields, dense, in the dtype that it computes in."""

    def __init__(self, spec: VisionSpec, weights: Iterable[LoadedWeight], device: torch.device) -> None:
        self.spec, self.device = spec, device
        self._tower = TOWERS[type(spec.tower)](spec, held(weights), device)

    @torch.inference_mode()
    def encode(self, prepared: Sequence[PreparedImage]) -> list[Tensor]:
        """Of each image ``[1 + deepstack, tokens, out_hidden]`` on the device, in the dtype of the weights. All of them
        go through the tower together; what one is among others changes nothing but rounding."""
        return self._tower.encode(prepared)
