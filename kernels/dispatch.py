"""The operations that models are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from lightllmd.architecture.schemes import DENSE, Scheme
from lightllmd.kernels.collectives import Group
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.layout import Batch, Heads
from lightllmd.kernels.linear import Embedding, Head, Linear, Norm, ProjectionNorm
from lightllmd.kernels.quantised import QuantisedMatrix, quantise
from lightllmd.kernels.schemes import WHOLE, Shard, built
from lightllmd.kernels.tensor_parallel import (
    RowParallelLinear,
    SharedScales,
    VocabularyParallelEmbedding,
    VocabularyParallelHead,
    normalise_together_,
)


class Attention(Protocol):
    """Attention over the KV cache, on one device."""

    def __call__(
        self,
        qkv: Tensor,
        cache: LayerCache,
        batch: Batch,
        heads: Heads,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """``qkv [T, (H + 2K) D]``, given away -> ``[T, H D]``: norms of the heads if there are any, rotation, keys and
        values into the cache, causal attention of each token over its row; ``[R, H D]`` of the `wanted` [R] if any
        are named."""


class Kernels(ABC):
    """Makes what holds weights for one device and dtype, and computes what holds none.

    A step's T tokens run as the residual stream ``[T, hidden]``, whose buffer may be written in place.
    """

    def __init__(
        self,
        linears: Mapping[str, Callable[..., Linear]],
        heads: Mapping[str, Callable[..., Head]],
        embedding: Callable[[Tensor, float | None, int | None], Embedding],
        attention: Attention,
        group: Group,
    ) -> None:
        """Linears and heads by the name of the scheme that they store weights by: that of "dense" takes over a weight
        ``[out, in]``, any other one a `QuantisedMatrix`, and each a bias ``[out]`` or None. An embedding of the rows
        from a given token on is zeros for others; None: it has all rows."""
        self.attention, self.group = attention, group
        self._linears, self._heads, self._embedding = linears, heads, embedding

    def linear(
        self,
        role: str,
        weight: Tensor | QuantisedMatrix,
        bias: Tensor | None,
        scheme: Scheme = DENSE,
        shard: Shard = WHOLE,
    ) -> Linear:
        """Takes over a weight ``[out, in]`` and its bias ``[out]``, in the model's dtype and on its device, and stores
        them by `scheme`; one that comes quantised has its own. `role`: what the weight is for, such as "qkv". Raises
        EngineError for what is not built."""
        if isinstance(weight, Tensor) and not scheme.dense:
            weight = quantise(weight, scheme)
        order = None
        if shard.axis == 1 and isinstance(weight, QuantisedMatrix):
            order, weight = weight.order, weight.unordered()
        scheme = scheme if isinstance(weight, Tensor) else weight.scheme
        made = built(role, scheme, self._linears)(weight, bias)
        if shard.axis != 1:
            return made
        scales, stored = None, weight if isinstance(weight, Tensor) else weight.values
        if shard.rounded_together:
            scales = SharedScales(scheme, stored.shape[1], shard, self.group, stored.device)
        return RowParallelLinear(made, self.group, scales, order)

    def embedding(self, weight: Tensor, scale: float | None = None, shard: Shard = WHOLE) -> Embedding:
        """Takes over the rows of the vocabulary ``[vocab, hidden]``. The scale is rounded to their dtype."""
        if shard.axis is None:
            return self._embedding(weight, scale, None)
        return VocabularyParallelEmbedding(self._embedding(weight, scale, shard.begin), self.group)

    def head(
        self,
        weight: Tensor,
        norm: Norm,
        *,
        tied: bool,
        soft_cap: float | None = None,
        scheme: Scheme = DENSE,
        shard: Shard = WHOLE,
    ) -> Head:
        """Takes over the rows ``[vocab, hidden]`` of the language model head; `tied`: they are the embedding's.

        soft_cap: logits become ``soft_cap * tanh(logits / soft_cap)``, in fp32. Raises EngineError for what is not
        built."""
        made = built("head", scheme, self._heads)(weight, norm, tied=tied, soft_cap=soft_cap)
        return made if shard.axis is None else VocabularyParallelHead(made, self.group, shard.size)

    def normalise_projections_(self, x: Tensor, norms: Sequence[ProjectionNorm]) -> None:
        """Columns of ``x [T, N]`` become what their norms make of them."""
        if self.group.ranks > 1:
            normalise_together_(x, norms, self.group)
            return
        for one in norms:
            self.normalise_(x[:, one.columns], one.norm)

    @abstractmethod
    def normalise_(self, x: Tensor, norm: Norm) -> None:
        """``x [T, N]`` becomes ``norm(x)``, for N = len(norm.weight); rows may lie apart."""
