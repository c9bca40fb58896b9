"""What stands behind the last layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightllmd.kernels.dispatch import Kernels
from lightllmd.kernels.linear import Linear


@dataclass
class LanguageHead:
    kernels: Kernels
    norm: Tensor
    eps: float
    linear: Linear

    def logits(self, hidden: Tensor) -> Tensor:
        """``[R, hidden]`` of the last layer -> fp32 ``[R, vocab]``."""
        return self.linear(self.kernels.rms_norm(hidden, self.norm, self.eps)).float()
