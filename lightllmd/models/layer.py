"""A decoder layer: attention and a feed-forward block, each with its norms and its residual."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightllmd.architecture.spec import DecoderSpec, GatedMlp, GroupedQuery, LayerSpec, RmsNorm
from lightllmd.architecture.weights import Role
from lightllmd.kernels.dispatch import Kernels
from lightllmd.kernels.kv_cache import LayerCache
from lightllmd.kernels.layout import Batch, Heads
from lightllmd.kernels.linear import Linear, Norm, ProjectionNorm


@dataclass(frozen=True)
class LayerWeights:
    """Of one layer, by role: what is multiplied with, and norms. Which norms there are says where they stand."""

    linears: Mapping[Role, Linear]
    norms: Mapping[Role, Norm]


class GroupedQueryAttention:
    """Grouped-query attention over the KV cache."""

    def __init__(self, spec: GroupedQuery, norm: RmsNorm, kernels: Kernels, weights: LayerWeights) -> None:
        self.heads = Heads(
            query=spec.heads,
            kv=spec.kv_heads,
            dim=spec.head_dim,
            scale=spec.scale,
            norm_eps=norm.eps,
            window=spec.window,
            soft_cap=spec.soft_cap,
            rotary=spec.rotary,
            norm_offset=norm.offset,
        )
        self._kernels = kernels
        self._norm = weights.norms.get("attention_norm")
        self._post_norm = weights.norms.get("attention_post_norm")
        self._qkv, self._out = weights.linears["qkv"], weights.linears["attention_out"]
        self._head_norms: tuple[Tensor | None, Tensor | None] = None, None  # of queries and of keys, [D]
        self._projection_norms: list[ProjectionNorm] = []  # of columns of qkv
        if spec.qk_norm == "head":
            self._head_norms = weights.norms["q_norm"].weight, weights.norms["k_norm"].weight
        elif spec.qk_norm == "projection":
            self._projection_norms = _projection_norms(spec, weights.norms["q_norm"], weights.norms["k_norm"])

    def forward(self, x: Tensor, cache: LayerCache, batch: Batch, wanted: Tensor | None) -> Tensor:
        """``x [T, hidden]`` -> ``x + post_norm(attention(norm(x)))``, with the norms that there are, perhaps in place;
        with `wanted` [R] of these tokens alone, ``[R, hidden]``: the others have their keys and values stored."""
        qkv = self._qkv(x, norm=self._norm)
        if self._projection_norms:
            self._kernels.normalise_projections_(qkv, self._projection_norms)
        attended = self._kernels.attention(qkv, cache, batch, self.heads, *self._head_norms, wanted)
        if wanted is not None:
            x = x.index_select(0, wanted)
        return self._out(attended, post_norm=self._post_norm, residual=x)


def _projection_norms(spec: GroupedQuery, q_norm: Norm, k_norm: Norm) -> list[ProjectionNorm]:
    heads, kv_heads, repeats = spec.heads, spec.kv_heads, False
    if spec.shared is not None:
        heads, kv_heads, repeats = spec.shared.heads, spec.shared.kv_heads, spec.shared.repeats
    q, k = slice(spec.q_size), slice(spec.q_size, spec.q_size + spec.kv_size)
    return [
        ProjectionNorm(q_norm, q, heads * spec.head_dim),
        ProjectionNorm(k_norm, k, kv_heads * spec.head_dim, repeats),
    ]


class GatedFeedForward:
    """Gated multilayer perceptron."""

    def __init__(self, spec: GatedMlp, weights: LayerWeights) -> None:
        self._activation = spec.activation
        self._norm = weights.norms.get("feed_forward_norm")
        self._post_norm = weights.norms.get("feed_forward_post_norm")
        self._gate_up, self._down = weights.linears["gate_up"], weights.linears["down"]

    def forward(self, x: Tensor) -> Tensor:
        """``x [T, hidden]`` -> ``x + post_norm(mlp(norm(x)))``, with the norms that there are, perhaps in place."""
        hidden = self._gate_up(x, norm=self._norm, activation=self._activation)
        return self._down(hidden, post_norm=self._post_norm, residual=x)


# By the kind that a layer's specification names.
ATTENTION = {GroupedQuery: GroupedQueryAttention}
FEED_FORWARD = {GatedMlp: GatedFeedForward}


class DecoderLayer:
    """Attention, then a feed-forward block."""

    def __init__(self, spec: LayerSpec, decoder: DecoderSpec, kernels: Kernels, weights: LayerWeights) -> None:
        self.attention = ATTENTION[type(spec.attention)](spec.attention, decoder.norm, kernels, weights)
        self.feed_forward = FEED_FORWARD[type(spec.feed_forward)](spec.feed_forward, weights)

    def forward(self, x: Tensor, cache: LayerCache, batch: Batch, wanted: Tensor | None = None) -> Tensor:
        """The residual stream ``[T, hidden]`` to the next, perhaps in place; of the `wanted` [R] tokens alone, where
        they are named: of the last layer no others are needed."""
        return self.feed_forward.forward(self.attention.forward(x, cache, batch, wanted))
