"""The operations that models are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from lightllmd.architecture.schemes import DENSE, Scheme
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.layout import Batch, Heads
from lightllmd.kernels.linear import Embedding, Head, Linear, Norm
from lightllmd.kernels.quantised import QuantisedMatrix, quantise
from lightllmd.kernels.schemes import WHOLE, Shard, built


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
        embedding: Callable[[Tensor, float | None], Embedding],
        attention: Attention,
    ) -> None:
        """Linears and heads by the name of the scheme that they store weights by: that of "dense" takes over a weight
        ``[out, in]``, any other one a `QuantisedMatrix`, and each a bias ``[out]`` or None."""
        self.attention = attention
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
        if isinstance(weight, QuantisedMatrix):
            return built(role, weight.scheme, shard, self._linears)(weight, bias)
        make = built(role, scheme, shard, self._linears)
        return make(weight if scheme.dense else quantise(weight, scheme), bias)

    def embedding(self, weight: Tensor, scale: float | None = None) -> Embedding:
        """Takes over the rows of the vocabulary ``[vocab, hidden]``. The scale is rounded to their dtype."""
        return self._embedding(weight, scale)

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
        return built("head", scheme, shard, self._heads)(weight, norm, tied=tied, soft_cap=soft_cap)

    @abstractmethod
    def normalise_(self, x: Tensor, norm: Norm) -> None:
        """``x [T, N]`` becomes ``norm(x)``, for N = len(norm.weight); rows may lie apart."""
