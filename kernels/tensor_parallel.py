"""What is wrapped around the operations of one device where several ranks compute a model together
(Shoeybi et al. 2019, "Megatron-LM"): every rank has a part of the weight, and its result is put together with the
others'. Linears whose outputs are shared out need nothing: what reads them is shared out likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from lightllmd.architecture.schemes import Scheme
from lightllmd.kernels.collectives import Group
from lightllmd.kernels.layout import Batch
from lightllmd.kernels.linear import Embedding, Head, Linear, Norm, ProjectionNorm, ScaledInputs, Unfinished
from lightllmd.kernels.schemes import Shard


class RowParallelLinear(Linear):
    """Of a weight whose inputs are shared out: the results of all ranks are summed, then comes what is behind them."""

    def __init__(self, part: Linear, group: Group, scales: SharedScales | None, order: Tensor | None) -> None:
        """`part`: of this rank; the bias is in one rank's. `scales`: of inputs that are rounded together. `order`: of
        each column of the part its input, where they are not in their order; one behind the last is 0."""
        super().__init__(part.out_features, **part.tensors(), order=order)
        self._part, self._group, self._scales, self._order = part, group, scales, order

    def _taken(self, x: Unfinished) -> Tensor | Unfinished:
        return x if self._scales is None and self._order is None else x.tensor()

    def _fused(self, x: Any, norm: Norm | None, activation: str | None, residual: Tensor | None) -> Any:
        # Both would need the inputs, or the outputs, of all ranks.
        assert norm is None
        assert activation is None
        if self._order is not None:
            x = functional.pad(x, (0, 1)).index_select(1, self._order)
        if self._scales is not None:
            x = ScaledInputs(x, self._scales.largest(x))
        return self._group.sum_(self._part(x), residual)

    def _post_normed(self, out: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
        return self._part._post_normed(out, norm, residual)


class SharedScales:
    """The largest magnitudes of groups of inputs that several ranks have parts of, so that all round them alike."""

    def __init__(self, scheme: Scheme, columns: int, shard: Shard, group: Group, device: torch.device) -> None:
        """`scheme`: of this rank's weight, which has so many columns."""
        self._group, self._each = group, scheme.group or columns
        self._places: Tensor | None = None  # of this rank's groups among those of the whole
        self._count = -(-shard.size // shard.rounded_together)
        if self._count > 1 or columns > self._each:
            firsts = torch.arange(shard.begin, shard.begin + columns, self._each, device=device)
            self._places = firsts // shard.rounded_together

    def largest(self, x: Tensor) -> Tensor:
        """Of this rank's ``x [T, K]``, fp32 ``[T, G]``."""
        if more := -x.shape[1] % self._each:
            x = functional.pad(x, (0, more))
        own = torch.linalg.vector_norm(x.unflatten(1, (-1, self._each)), float("inf"), 2, dtype=torch.float32)
        if self._places is None:
            return self._group.max_(own)
        places = self._places.expand(len(own), -1)
        whole = own.new_zeros(len(own), self._count).scatter_reduce_(1, places, own, "amax")
        return self._group.max_(whole).gather(1, places)


class VocabularyParallelEmbedding(Embedding):
    """Every rank has some of the rows: of a token, all but one add zeros."""

    def __init__(self, part: Embedding, group: Group) -> None:
        """`part`: zeros for tokens of other ranks."""
        super().__init__(part.weight)
        self._part, self._group = part, group

    def __call__(self, batch: Batch) -> Tensor:
        return self._group.sum_(self._part(batch))


class VocabularyParallelHead(Head):
    """Every rank computes the logits of its rows, and has those of all."""

    def __init__(self, part: Head, group: Group, vocab: int) -> None:
        """`vocab`: rows of all ranks, without those of zeros behind the last."""
        self._part, self._group, self._vocab = part, group, vocab

    def logits(self, hidden: Tensor) -> Tensor:
        return self._group.gather_columns(self._part.logits(hidden), self._vocab)

    def tensors(self) -> dict[str, Tensor]:
        return self._part.tensors()


def normalise_together_(x: Tensor, norms: Sequence[ProjectionNorm], group: Group) -> None:
    """Root mean square norms of columns of ``x [T, N]``, in place, each over the columns of all ranks."""
    squares = []
    for one in norms:
        own = x[:, one.columns].float().square().sum(1)
        squares.append(torch.zeros_like(own) if one.repeated else own)
    sums = group.sum_small(torch.stack(squares, 1))
    for one, total in zip(norms, sums.split(1, 1), strict=True):
        columns, norm = x[:, one.columns], one.norm
        scale = torch.rsqrt(total / one.size + norm.eps)
        columns.copy_(columns.float() * scale * (norm.offset + norm.weight.float()))
