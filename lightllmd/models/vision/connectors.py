"""Connectors: from a tower's features to image embeddings."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor

from lightllmd.architecture.vision.spec import MlpConnector, PoolConnector
from lightllmd.models.vision.layers import Weights, activate, layer_norm, linear


class Mlp:
    """Runs an `MlpConnector`."""

    def __init__(self, spec: MlpConnector, weights: Weights) -> None:
        self._spec, self._weights = spec, weights
        self.newline = weights["newline"].weight if spec.newline else None

    def embeddings(self, features: Tensor) -> Tensor:
        """``[tiles, tokens, width]`` -> ``[tiles, tokens / shuffle ** 2, outputs]``."""
        spec = self._spec
        x = features if spec.shuffle == 1 else shuffled(features, spec.shuffle)
        if spec.norm:
            x = layer_norm(x, self._weights["norm"], spec.norm_eps)
        x = activate(linear(x, self._weights["linear_1"]), spec.activation)
        return linear(x, self._weights["linear_2"])


class Pool:
    """Runs a `PoolConnector`."""

    newline = None

    def __init__(self, spec: PoolConnector, weights: Weights) -> None:
        self._spec, self._weights = spec, weights

    def embeddings(self, features: Tensor) -> Tensor:
        """``[tiles, side * side, width]`` -> ``[tiles, tokens, outputs]``."""
        spec = self._spec
        square = features.transpose(1, 2).unflatten(2, (spec.side, spec.side))
        x = functional.avg_pool2d(square, spec.block).flatten(2).transpose(1, 2)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + spec.norm_eps)
        wide *= 1 + self._weights["norm"].weight.float()
        return wide.to(x.dtype) @ self._weights["projection"].weight


CONNECTORS: dict[type, Callable[..., Mlp | Pool]] = {MlpConnector: Mlp, PoolConnector: Pool}


def shuffled(features: Tensor, times: int) -> Tensor:
    """Of squares ``[tiles, side * side, width]`` each `times` x `times` block as one, row by row: pixel shuffle
    (Shi et al. 2016) the other way round."""
    tiles, tokens, width = features.shape
    side = int(tokens**0.5) // times
    blocks = features.reshape(tiles, side, times, side, times, width)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(tiles, side * side, times * times * width)
