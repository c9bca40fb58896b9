"""Layers that the towers share: norms, activations, attention within images, linears with their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from lightllmd.architecture.vision.pixels import PixelNorm
from lightllmd.architecture.vision.spec import TowerActivation
from lightllmd.weights.loaded import LoadedWeight


@dataclass(frozen=True)
class Weight:
    """A weight and, where there is one, its bias."""

    weight: Tensor
    bias: Tensor | None = None


Weights = Mapping[str, Weight]  # by the kind that the specification's list gives them


def held(loaded: Iterable[LoadedWeight]) -> dict[str, Weight]:
    """Takes over what `loaded` yields, dense, as it comes."""
    found: dict[str, Weight] = {}
    for spec, tensor, bias in loaded:
        assert isinstance(tensor, Tensor)
        found[spec.key] = Weight(tensor, bias)
    return found


def linear(x: Tensor, weight: Weight) -> Tensor:
    """``[…, in]`` -> ``[…, out]``."""
    return functional.linear(x, weight.weight, weight.bias)


def layer_norm(x: Tensor, weight: Weight, eps: float) -> Tensor:
    """Over the last dimension (Ba et al. 2016)."""
    return functional.layer_norm(x, x.shape[-1:], weight.weight, weight.bias, eps)


def rms_norm(x: Tensor, weight: Weight, eps: float) -> Tensor:
    """Over the last dimension, in fp32; multiplied in the dtype of `x`."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight.weight * wide.to(x.dtype)


def activate(x: Tensor, activation: TowerActivation) -> Tensor:
    """Elementwise, perhaps in place."""
    match activation:
        case "silu":
            return functional.silu(x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "quick_gelu":
            if x.is_cuda:  # one launch instead of three, each of which reads and writes all of it
                from lightllmd.kernels.activation import quick_gelu_

                return quick_gelu_(x)
            return x * torch.sigmoid(1.702 * x)
        case "relu":
            return functional.relu(x)


def attend(qkv: Tensor, heads: int) -> Tensor:
    """``[images, tokens, 3 * hidden]`` -> ``[images, tokens, hidden]``: each token attends to all of its image."""
    images, tokens, wide = qkv.shape
    query, key, value = qkv.view(images, tokens, 3, heads, wide // (3 * heads)).permute(2, 0, 3, 1, 4)
    out = functional.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).reshape(images, tokens, wide // 3)


class Normaliser:
    """A `PixelNorm` on a device."""

    def __init__(self, norm: PixelNorm, device: torch.device) -> None:
        self._rescale = norm.rescale
        self._mean, self._std = torch.tensor(norm.mean, device=device), torch.tensor(norm.std, device=device)

    def __call__(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 ``[…, 3]`` -> the same in `dtype`, normalised in fp32 by channel."""
        return ((pixels.float() * self._rescale - self._mean) / self._std).to(dtype)


def normalised(pixels: Tensor, norm: PixelNorm, dtype: torch.dtype) -> Tensor:
    """uint8 ``[…, 3]`` -> the same in `dtype`, normalised in fp32 by channel."""
    return Normaliser(norm, pixels.device)(pixels, dtype)


def patches(pixels: Tensor, patch: int) -> Tensor:
    """``[tiles, height, width, 3]`` -> ``[tiles, rows * columns, 3 * patch * patch]``, channels first, as the weights
    of a convolution have them. Pixels that fill no patch are left out."""
    tiles, height, width, channels = pixels.shape
    rows, columns = height // patch, width // patch
    cut = pixels[:, : rows * patch, : columns * patch]
    cut = cut.reshape(tiles, rows, patch, columns, patch, channels)
    return cut.permute(0, 1, 3, 5, 2, 4).reshape(tiles, rows * columns, channels * patch * patch)
