"""What stands behind the last layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightllmd.kernels.dispatch import Kernels
from lightllmd.kernels.linear import Linear

# The logits computed again in fp32: more than any close race for the next token has runners.
CLOSE = 32


@dataclass
class LanguageHead:
    """`weight` ``[vocab, hidden]`` is what `linear` multiplies with, in rows."""

    kernels: Kernels
    norm: Tensor
    eps: float
    linear: Linear
    weight: Tensor

    def logits(self, hidden: Tensor) -> Tensor:
        """``[R, hidden]`` of the last layer -> fp32 ``[R, vocab]``.

        A 16-bit product is rounded when it is stored: around 25, where the best logits of real models lie, bf16 knows
        only every eighth, so that the best two often tie. The highest `CLOSE` of each row are therefore computed
        again in fp32, which costs the rows that they take.
        """
        x = self.kernels.rms_norm(hidden, self.norm, self.eps)
        logits = self.linear(x).float()
        if x.dtype is not torch.float32:
            close = logits.topk(min(CLOSE, logits.shape[-1])).indices
            exact = torch.einsum("rh,rch->rc", x.float(), self.weight[close].float())
            logits.scatter_(-1, close, exact)
        return logits
