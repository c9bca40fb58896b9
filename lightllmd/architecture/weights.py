"""The weights that follow from a specification, as one list: loading, dummy weights, budget and decoder read it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from lightllmd.architecture.spec import DecoderSpec, GatedMlp, GroupedQuery, NormPlacement, ScoreHead

# What a weight is for. Those of a layer occur once in each.
Role = Literal[
    "embed",
    "attention_norm",
    "attention_post_norm",
    "feed_forward_norm",
    "feed_forward_post_norm",
    "q_norm",
    "k_norm",
    "qkv",
    "attention_out",
    "gate_up",
    "down",
    "norm",
    "head",
    "score_inner",
    "score",
    "vision",  # of a tower or connector, which the kind of its first part tells from others
]

# Of a layer, in the order in which they are loaded.
NORMS: dict[NormPlacement, tuple[Role, ...]] = {
    "pre": ("attention_norm", "feed_forward_norm"),
    "pre_post": ("attention_norm", "attention_post_norm", "feed_forward_norm", "feed_forward_post_norm"),
    "post": ("attention_post_norm", "feed_forward_post_norm"),
}

# A checkpoint's name of each tensor, by what it is, without ".weight" and ".bias"; {layer} stands for the layer's
# number. The keys are the roles, but for "q", "k", "v" of qkv (where there is no "qkv") and "gate", "up" of gate_up.
Names = Mapping[str, str]


@dataclass(frozen=True)
class TensorCut:
    """What one rank holds of a tensor: `runs` of its rows (axis 0) or columns (axis 1), in their order, each from its
    first to behind its last one."""

    shape: tuple[int, ...]  # of the whole tensor
    axis: Literal[0, 1]
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint, by its Hugging Face name, and the shape that the config makes it have: of what one
    rank holds of it where there is a `cut`, with the rows and columns of zeros that it may be filled up with."""

    kind: str  # key of `Names`
    name: str
    shape: tuple[int, ...]
    shard_unit: int = 1  # rows or columns that stay on one rank: those of a head
    cut: TensorCut | None = None

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def held_shape(self) -> tuple[int, ...]:
        """Of what the checkpoint's tensor has of it."""
        if self.cut is None:
            return self.shape
        size = sum(end - begin for begin, end in self.cut.runs)
        return (*self.shape[: self.cut.axis], size, *self.shape[self.cut.axis + 1 :])


@dataclass(frozen=True)
class WeightSpec:
    """A tensor of the decoder: `parts` stacked along the first dimension, and likewise its bias if it has one.

    With `groups` the checkpoint has its rows as several groups: in each are ``groups[0]`` rows of what comes first in
    the decoder, then ``groups[1]`` of what comes next, and so on.

    Matrices are ``[out, in]``. Tensor parallelism splits each part along `shard_axis` (0: out, and the bias with it;
    1: in, and the bias stays whole on one rank); None: every rank has all of it.
    """

    role: Role
    layer: int | None  # None: there is one for all layers
    parts: tuple[Part, ...]
    bias: tuple[Part, ...] = ()
    shard_axis: Literal[0, 1] | None = None
    quantisable: bool = False
    groups: tuple[int, ...] = ()
    neutral: float = 0.0  # what random numbers vary around: where it is a norm, what leaves its input as it is
    whole: WeightSpec | None = None  # where this is one rank's part: what it is a part of
    # Of such a part: inputs that share a scale, where it ends inside a group of the scheme; 0: as many as in a group.
    group: int = 0
    # Of such a part, where inputs are rounded: neighbouring inputs of the whole weight that share a scale although
    # several ranks have some of them; 0: there are none.
    rounded_together: int = 0

    @property
    def key(self) -> str:
        """Its name among the decoder's weights, such as ``3.qkv``, or among a vision model's."""
        if self.role == "vision":
            return self.parts[0].kind
        return self.role if self.layer is None else f"{self.layer}.{self.role}"

    @property
    def stored(self) -> tuple[Part, ...]:
        """All tensors of the checkpoint that it is made of."""
        return self.parts + self.bias

    @property
    def elements(self) -> int:
        """Parameters, biases included."""
        return sum(part.elements for part in self.stored)


def weights_of(spec: DecoderSpec, names: Names) -> tuple[WeightSpec, ...]:
    """In the order in which they are loaded: embedding, layer by layer, final norm, head (none where it is tied)."""
    make = _Maker(spec, names)
    weights = [make.table("embed"), *make.layers(), make.norm("norm", None)]
    if spec.scores is not None:
        return (*weights, *make.scores(spec.scores))
    return (*weights,) if spec.tied or spec.headless else (*weights, make.table("head"))


class _Maker:
    def __init__(self, spec: DecoderSpec, names: Names) -> None:
        self._spec, self._names = spec, names

    def table(self, role: Role) -> WeightSpec:
        """``[vocab, hidden]``."""
        part = self._part(role, None, (self._spec.vocab, self._spec.hidden))
        return WeightSpec(role, None, (part,), shard_axis=0)

    def norm(self, role: Role, layer: int | None, size: int | None = None) -> WeightSpec:
        """``[size]``, or ``[hidden]``."""
        part = self._part(role, layer, (size or self._spec.hidden,))
        return WeightSpec(role, layer, (part,), neutral=1.0 - self._spec.norm.offset)

    def scores(self, head: ScoreHead) -> Iterator[WeightSpec]:
        """Every rank has all of them."""
        widths: dict[Role, int] = {"score_inner": head.inner or 0, "score": head.values}
        columns = self._spec.hidden
        for role, rows in widths.items():
            if rows:
                bias = (self._part(role, None, (rows,), suffix="bias"),) if head.bias else ()
                yield WeightSpec(role, None, (self._part(role, None, (rows, columns)),), bias)
                columns = rows

    def layers(self) -> Iterator[WeightSpec]:
        for number, layer in enumerate(self._spec.layers):
            for role in NORMS[self._spec.norm_placement]:
                yield self.norm(role, number)
            yield from self._attention(number, layer.attention)
            yield from self._feed_forward(number, layer.feed_forward)

    def _attention(self, layer: int, spec: GroupedQuery) -> Iterator[WeightSpec]:
        hidden, unit = self._spec.hidden, spec.head_dim
        if spec.qk_norm:
            whole = spec.qk_norm == "projection"
            sizes: dict[Role, int] = {"q_norm": spec.q_size, "k_norm": spec.kv_size}
            for role, size in sizes.items():
                norm = self.norm(role, layer, size if whole else unit)
                yield replace(norm, shard_axis=0) if whole else norm
        if "qkv" in self._names:
            groups = spec.q_size // spec.kv_heads, unit, unit
            rows, group = {"qkv": spec.q_size + 2 * spec.kv_size}, sum(groups)
            qkv = self._matrix("qkv", layer, rows, hidden, spec.qkv_bias, shard_axis=0, unit=group)
            yield replace(qkv, groups=groups)
        else:
            rows = {"q": spec.q_size, "k": spec.kv_size, "v": spec.kv_size}
            yield self._matrix("qkv", layer, rows, hidden, spec.qkv_bias, shard_axis=0, unit=unit)
        out = {"attention_out": hidden}
        yield self._matrix("attention_out", layer, out, spec.q_size, spec.out_bias, shard_axis=1, unit=unit)

    def _feed_forward(self, layer: int, spec: GatedMlp) -> Iterator[WeightSpec]:
        hidden, inner = self._spec.hidden, spec.intermediate
        yield self._matrix("gate_up", layer, {"gate": inner, "up": inner}, hidden, spec.bias, shard_axis=0)
        yield self._matrix("down", layer, {"down": hidden}, inner, spec.bias, shard_axis=1)

    def _matrix(
        self,
        role: Role,
        layer: int,
        rows: Mapping[str, int],
        columns: int,
        biased: bool,
        *,
        shard_axis: Literal[0, 1],
        unit: int = 1,
    ) -> WeightSpec:
        """Of parts with `rows` each."""
        weights = tuple(self._part(kind, layer, (count, columns), unit) for kind, count in rows.items())
        biases: tuple[Part, ...] = ()
        if biased:
            biases = tuple(self._part(kind, layer, (count,), unit, "bias") for kind, count in rows.items())
        return WeightSpec(role, layer, weights, biases, shard_axis, quantisable=True)

    def _part(
        self, kind: str, layer: int | None, shape: tuple[int, ...], unit: int = 1, suffix: str = "weight"
    ) -> Part:
        return Part(kind, f"{self._names[kind].format(layer=layer)}.{suffix}", shape, unit)
