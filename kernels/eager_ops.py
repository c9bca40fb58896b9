"""Norm, activation and soft cap as torch's own calls. Shapes and meaning: `reference`."""

from __future__ import annotations

import torch.nn.functional as functional
from torch import Tensor

from lightllmd.kernels.reference import ACTIVATIONS


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Of the last dimension of x, in x's dtype. With an offset all of it is computed in fp32 and rounded once."""
    if offset:
        return functional.rms_norm(x.float(), weight.shape, weight.float() + offset, eps).to(x.dtype)
    return functional.rms_norm(x, weight.shape, weight, eps)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """``gate_up [T, 2I]``, gate first -> ``[T, I]``."""
    gate, up = gate_up.chunk(2, -1)
    return ACTIVATIONS[activation](gate).mul_(up)


def soft_cap_(logits: Tensor, cap: float) -> Tensor:
    """``cap * tanh(logits / cap)`` in place, of fp32 logits of any shape."""
    return logits.div_(cap).tanh_().mul_(cap)
