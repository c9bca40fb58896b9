"""Norm and activation as torch's own calls. Shapes and meaning: `reference`."""

from __future__ import annotations

import torch.nn.functional as functional
from torch import Tensor

from lightllmd.kernels.reference import ACTIVATIONS


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, eps)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return ACTIVATIONS[activation](gate).mul_(up)
