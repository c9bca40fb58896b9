"""The operations as few torch calls as possible, on any device. Shapes and meaning: `reference`.

What the decode step costs on a CPU beside its matmuls is the number of calls, so each takes one to four.
"""

from __future__ import annotations

import logging
from functools import partial

import torch
import torch.nn.functional as functional
from torch import Tensor

from lightllmd.architecture.schemes import DENSE, Scheme
from lightllmd.kernels.collectives import ALONE, Group
from lightllmd.kernels.cpu.linears import cpu_linears
from lightllmd.kernels.dequantised_linear import DEQUANTISED, DequantisedLinear
from lightllmd.kernels.dispatch import Kernels
from lightllmd.kernels.eager_attention import attention
from lightllmd.kernels.eager_linear import DenseLinear, EagerHead, PackedLinear
from lightllmd.kernels.eager_ops import rms_norm
from lightllmd.kernels.layout import Batch, GatheredRows
from lightllmd.kernels.linear import Embedding, Linear, Norm
from lightllmd.kernels.quantised import QuantisedMatrix
from lightllmd.kernels.schemes import WHOLE, Shard

log = logging.getLogger(__name__)


class EagerEmbedding(Embedding):
    """Of a batch of `GatheredRows`."""

    def __init__(self, weight: Tensor, scale: float | None, first: int | None) -> None:
        """`first`: the token of the first row where others have no row."""
        super().__init__(weight)
        # As transformers has it: rounded to the dtype, as the result is.
        self._scale = None if scale is None else torch.tensor(scale, dtype=weight.dtype, device=weight.device)
        self._first = first

    def __call__(self, batch: Batch[GatheredRows]) -> Tensor:
        if self._first is None:
            x = functional.embedding(batch.tokens, self.weight)
        else:
            x = self._ours(batch.tokens - self._first)
        return x if self._scale is None else x.mul_(self._scale)

    def _ours(self, places: Tensor) -> Tensor:
        """Of rows that may be beyond those that are here."""
        others = (places < 0) | (places >= len(self.weight))
        return functional.embedding(places.masked_fill_(others, 0), self.weight).masked_fill_(others[:, None], 0)


class EagerKernels(Kernels):
    """Of torch's own operations over rows gathered in groups."""

    def __init__(self, device: torch.device, dtype: torch.dtype, group: Group = ALONE) -> None:
        packs = device.type == "cpu" and PackedLinear.supports(dtype)
        dense = PackedLinear if packs else DenseLinear
        heads = {"dense": partial(EagerHead, dense)}
        fast = cpu_linears(dtype) if device.type == "cpu" else {}
        super().__init__({"dense": dense} | DEQUANTISED | fast, heads, EagerEmbedding, attention, group)
        self._slow: set[Scheme] = set()  # those that were told of

    def linear(
        self,
        role: str,
        weight: Tensor | QuantisedMatrix,
        bias: Tensor | None,
        scheme: Scheme = DENSE,
        shard: Shard = WHOLE,
    ) -> Linear:
        made = super().linear(role, weight, bias, scheme, shard)
        if isinstance(made, DequantisedLinear) and made.scheme not in self._slow:
            self._slow.add(made.scheme)
            log.warning("weights stored as %s are made dense for each matmul, which is slow", made.scheme)
        return made

    def normalise_(self, x: Tensor, norm: Norm) -> None:
        x.copy_(rms_norm(x, norm.weight, norm.eps, norm.offset))
