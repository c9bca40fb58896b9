"""From a model's facts to its encoder with weights on a device."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lightllmd.config.plan import ModelFacts
from lightllmd.config.stamps import require_unchanged
from lightllmd.errors import EngineError, WeightsInvalid
from lightllmd.models.vision.encoder import ImageEncoder
from lightllmd.weights import dummy, place
from lightllmd.weights.index import open_checkpoint
from lightllmd.weights.loaded import LoadedWeight, Progress


def load_encoder(
    model: ModelFacts, device: torch.device, dtype: torch.dtype, progress: Progress, dummy_weights: bool = False
) -> ImageEncoder:
    """With the weights of the model's checkpoint, dense in `dtype` whatever scheme its decoder is stored by; random
    ones where `dummy_weights` are asked for. Raises ModelChanged, WeightsInvalid, ConfigInvalid."""
    spec = model.vision
    if spec is None:
        raise EngineError(f"{model.path} is a model of text")
    if dummy_weights or model.format == "dummy":
        return ImageEncoder(spec, dummy.stream(spec.weights, dtype, device, progress), device)

    def weights() -> Iterator[LoadedWeight]:
        try:
            yield from place.stream(open_checkpoint(model), spec.weights, dtype, device, progress)
        except WeightsInvalid:
            require_unchanged(model.weight_stamps)
            raise
        require_unchanged(model.weight_stamps)

    return ImageEncoder(spec, weights(), device)
