"""What stands behind the last layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightllmd.kernels.dispatch import Kernels
from lightllmd.kernels.linear import Linear


@dataclass
class LanguageHead:
    """`weight` ``[vocab, hidden]`` is what `linear` multiplies with, in rows."""

    kernels: Kernels
    norm: Tensor
    eps: float
    linear: Linear
    weight: Tensor

    def logits(self, hidden: Tensor) -> Tensor:
        """``[R, hidden]`` of the last layer -> fp32 ``[R, vocab]``, the best ones exact in fp32 (see `Kernels`)."""
        return self.kernels.logits(hidden, self.norm, self.eps, self.linear, self.weight)
