"""Vision transformers over squares: CLIP, SigLIP, InternViT."""

from __future__ import annotations

import torch
from torch import Tensor

from lightllmd.architecture.vision.pixels import PixelNorm
from lightllmd.architecture.vision.spec import VitSpec
from lightllmd.models.vision.layers import (
    Normaliser,
    Weights,
    activate,
    attend,
    layer_norm,
    linear,
    patches,
    rms_norm,
)


class Vit:
    """Runs any `VitSpec`."""

    def __init__(self, spec: VitSpec, weights: Weights, norm: PixelNorm) -> None:
        self._spec, self._weights = spec, weights
        self._patch = weights["patch"].weight.flatten(1)
        self._normalised = Normaliser(norm, self._patch.device)
        positions = weights["position"].weight.view(spec.positions, spec.hidden)
        # Of each patch, and the first token as a whole: class token with its position.
        self._positions = positions[spec.class_token :]
        self._first = weights["class"].weight.view(1, 1, -1) + positions[:1] if spec.class_token else None

    def features(self, pixels: Tensor) -> Tensor:
        """uint8 ``[tiles, image, image, 3]`` -> ``[tiles, tokens, width]``."""
        spec = self._spec
        x = patches(self._normalised(pixels, self._patch.dtype), spec.patch)
        x = torch.nn.functional.linear(x, self._patch, self._weights["patch"].bias) + self._positions
        if self._first is not None:
            x = torch.cat([self._first.expand(len(x), 1, -1), x], 1)
        if spec.pre_norm:
            x = self._norm(x, "pre_norm")
        found = {0: x}
        for layer in range(spec.layers):
            x = self._layer(x, layer)
            if layer + 1 in spec.features:
                found[layer + 1] = x
        if spec.post_norm:
            found[spec.layers] = self._norm(x, "post_norm")
        first = int(spec.drops_first)
        states = [found[index][:, first:] for index in spec.features]
        return states[0] if len(states) == 1 else torch.cat(states, -1)

    def _layer(self, x: Tensor, layer: int) -> Tensor:
        spec, weights = self._spec, self._weights
        qkv = linear(self._norm(x, f"{layer}.norm1"), weights[f"{layer}.qkv"])
        if spec.qk_norm:
            query, key, value = qkv.chunk(3, -1)
            query = rms_norm(query, weights[f"{layer}.q_norm"], spec.qk_norm_eps)
            key = rms_norm(key, weights[f"{layer}.k_norm"], spec.qk_norm_eps)
            qkv = torch.cat([query, key, value], -1)
        added = linear(attend(qkv, spec.heads), weights[f"{layer}.out"])
        x = x + (added * weights[f"{layer}.scale1"].weight if spec.layer_scale else added)
        inner = activate(linear(self._norm(x, f"{layer}.norm2"), weights[f"{layer}.fc1"]), spec.activation)
        added = linear(inner, weights[f"{layer}.fc2"])
        return x + (added * weights[f"{layer}.scale2"].weight if spec.layer_scale else added)

    def _norm(self, x: Tensor, kind: str) -> Tensor:
        norm = layer_norm if self._spec.norm == "layer" or not kind[0].isdigit() else rms_norm
        return norm(x, self._weights[kind], self._spec.norm_eps)
