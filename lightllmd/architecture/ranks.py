"""Tensor parallelism (Shoeybi et al. 2019, "Megatron-LM"): what each rank of a group holds of a model. No torch.

Every rank computes some of the heads of each layer and some of the intermediate elements of its feed-forward block: it
holds the rows of "qkv" and "gate_up" that make them, and the columns of "attention_out" and "down" that read them,
whose products all ranks sum. It holds some of the vocabulary's rows. Norms and heads that score are whole on each.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightllmd.architecture.family import Architecture
from lightllmd.architecture.outline import Outline
from lightllmd.architecture.spec import GroupedQuery, LayerSpec, SharedHeads
from lightllmd.architecture.weight_schemes import WeightSchemes
from lightllmd.architecture.weights import Part, TensorCut, WeightSpec

Run = tuple[int, int]  # from the first to behind the last

VOCABULARY_UNIT = 16  # rows: logits of a rank are whole 64 bytes
# What feed-forward blocks are cut into, best first: matmuls like long runs, and a rank should have no more than its
# share and an eighth.
MLP_UNITS = (128, 64, 32, 16, 8, 4, 2, 1)
MOST_EXCESS = 1.125


@dataclass(frozen=True)
class Rank:
    """One process of a tensor-parallel group of `count`."""

    index: int = 0
    count: int = 1


ALONE = Rank()


def rank_faults(architecture: Architecture | Outline, schemes: WeightSchemes, count: int) -> list[str]:
    """Why so many ranks can't share a model; nothing if they can."""
    if count == 1:
        return []
    if isinstance(architecture, Outline):
        return [
            f"tp is {count}, but {architecture.architecture} is computed by transformers' own modules, which one rank "
            "computes: tp = 1 is available"
        ]
    faults = []
    layers = architecture.spec.layers
    heads = min(layer.attention.heads for layer in layers)
    if count > heads:
        faults.append(f"tp is {count}, but the model has {heads} query heads: 1 to {heads} ranks can share them")
    inner = min(layer.feed_forward.intermediate for layer in layers)
    if count > inner:
        faults.append(f"tp is {count}, but intermediate_size is {inner}: 1 to {inner} ranks can share it")
    return faults


def architecture_of_rank(architecture: Architecture, schemes: WeightSchemes, rank: Rank) -> Architecture:
    """One rank's. Its specification has the heads, KV heads and intermediate elements that are the rank's (not its
    vocabulary, which is the model's), its weights say what of each tensor the rank holds; `schemes` says of these, too,
    how they are stored. There are no `rank_faults`."""
    if rank.count == 1:
        return architecture
    groups = {weight.layer: schemes.of(weight).group for weight in architecture.weights if weight.role == "down"}
    cuts = [LayerCut(layer, groups[number], rank) for number, layer in enumerate(architecture.spec.layers)]
    held = [_held(weight, schemes, cuts, architecture.spec.vocab, rank) for weight in architecture.weights]
    spec = replace(architecture.spec, layers=tuple(cut.spec for cut in cuts))
    return replace(architecture, spec=spec, held=tuple(held))


def sizes_of_rank(architecture: Architecture, schemes: WeightSchemes, rank: Rank) -> Hashable:
    """What decides how many bytes a rank takes: ranks with equal ones take as many. Much cheaper than its
    architecture."""
    spec = architecture.spec
    groups = {weight.layer: schemes.of(weight).group for weight in architecture.weights if weight.role == "down"}
    found: dict[Hashable, Hashable] = {}
    for weight in architecture.weights:
        if weight.layer is None or weight.shard_axis != 1:
            continue
        layer, scheme, (part,) = spec.layers[weight.layer], schemes.of(weight), weight.parts
        key = (layer, groups[weight.layer], part.kind, part.shape, scheme)
        if key not in found:
            cut = LayerCut(layer, groups[weight.layer], rank)
            (run,), bias = cut.runs(part.kind), bool(weight.bias) and rank.index == 0
            columns = scheme.cut_columns(*run, part.shape[1])
            found[key] = (
                replace(cut.spec.attention, shared=None),
                cut.spec.feed_forward,
                columns,
                scheme.cut(run[0]),
                bias,
            )
    return tuple(found.values())


def vocabulary_of(vocab: int, rank: Rank) -> tuple[int, Run]:
    """How many rows each rank has, the last ones zeros where there are too few, and which of all are the rank's."""
    rows = -(-vocab // rank.count)
    rows += -rows % VOCABULARY_UNIT
    first = min(vocab, rank.index * rows)
    return rows, (first, min(vocab, first + rows))


def _held(weight: WeightSpec, schemes: WeightSchemes, cuts: list[LayerCut], vocab: int, rank: Rank) -> WeightSpec:
    axis = weight.shard_axis
    if axis is None:
        return weight
    if weight.layer is None:
        rows, run = vocabulary_of(vocab, rank)
        return replace(weight, parts=tuple(_part(part, 0, [run], rows) for part in weight.parts), whole=weight)
    cut = cuts[weight.layer]
    if axis == 0:
        parts = tuple(_part(part, axis, cut.runs(part.kind)) for part in weight.parts)
        bias = tuple(_part(part, 0, cut.runs(part.kind)) for part in weight.bias)
        groups = cut.groups if weight.groups else ()
        return replace(weight, parts=parts, bias=bias, groups=groups, whole=weight)
    scheme, columns = schemes.of(weight), weight.parts[0].shape[1]
    run = cut.runs(weight.parts[0].kind)[0]
    filled = scheme.cut_columns(*run, columns)
    firsts = [other.runs(weight.parts[0].kind)[0][0] for other in cut.of_all_ranks()]
    together = 0
    if scheme.inputs and not scheme.static:
        together = scheme.group or columns
        together = together if any(first % together for first in firsts) else 0
    group = scheme.cut(run[0]).group
    return replace(
        weight,
        parts=tuple(_part(part, axis, [run], filled) for part in weight.parts),
        bias=weight.bias if rank.index == 0 else (),  # added to the sum once
        whole=weight,
        group=group if group != scheme.group else 0,
        rounded_together=together,
    )


def _part(part: Part, axis: Literal[0, 1], runs: Sequence[Run], filled: int = 0) -> Part:
    """`filled`: rows or columns with those that are zeros."""
    size = filled or sum(end - begin for begin, end in runs)
    shape = (*part.shape[:axis], size, *part.shape[axis + 1 :])
    return replace(part, shape=shape, cut=TensorCut(part.shape, axis, tuple(runs)))


class LayerCut:
    """What one rank has of a layer."""

    def __init__(self, layer: LayerSpec, group: int, rank: Rank) -> None:
        """`group`: inputs of "down" that share a scale; 0: all, or there are no scales."""
        self._layer, self._group, self._rank = layer, group, rank
        self._heads = heads_of(layer.attention, rank)
        self._inner = intermediate_of(layer.feed_forward.intermediate, group, rank)

    @property
    def spec(self) -> LayerSpec:
        """Of the rank."""
        whole, heads = self._layer.attention, self._heads
        (q, q_end), (kv, kv_end) = heads.query, heads.kv
        shared = SharedHeads(whole.heads, whole.kv_heads, heads.repeats)
        attention = replace(whole, heads=q_end - q, kv_heads=kv_end - kv, shared=shared)
        inner, end = self._inner
        return LayerSpec(attention, replace(self._layer.feed_forward, intermediate=end - inner))

    def of_all_ranks(self) -> Iterator[LayerCut]:
        """In the order of their indices."""
        for index in range(self._rank.count):
            yield LayerCut(self._layer, self._group, Rank(index, self._rank.count))

    @property
    def groups(self) -> tuple[int, int, int]:
        """Of rows of a tensor that has queries, keys and values of a KV head one behind the other."""
        spec = self.spec.attention
        return spec.q_size // spec.kv_heads, spec.head_dim, spec.head_dim

    def runs(self, kind: str) -> list[Run]:
        """The rows, or of the second matmuls the columns, that are the rank's of a tensor of this kind."""
        heads, dim = self._heads, self._layer.attention.head_dim
        match kind:
            case "q" | "q_norm" | "attention_out":
                return [_times(heads.query, dim)]
            case "k" | "v" | "k_norm":
                return [_times(heads.kv, dim)]
            case "qkv":
                return self._grouped(dim)
            case "gate" | "up" | "down":
                return [self._inner]
        raise AssertionError(kind)

    def _grouped(self, dim: int) -> list[Run]:
        """Of a tensor in which the query heads of each KV head are followed by its keys and values."""
        whole, ((q, q_end), (kv, kv_end)) = self._layer.attention, (self._heads.query, self._heads.kv)
        each = whole.heads // whole.kv_heads
        if q_end - q == each * (kv_end - kv):
            return [_times((kv, kv_end), (each + 2) * dim)]
        begin = kv * (each + 2)  # of the only KV head, some of whose query heads are other ranks'
        first = begin + q - kv * each
        return [_times((first, first + q_end - q), dim), _times((begin + each, begin + each + 2), dim)]


@dataclass(frozen=True)
class HeadCut:
    """Which heads of attention are a rank's. Each of its KV heads has equally many of its query heads."""

    query: Run
    kv: Run
    repeats: bool  # the rank before has the same KV head


def heads_of(spec: GroupedQuery, rank: Rank) -> HeadCut:
    """KV heads with all of their query heads; where there are fewer than ranks, each is on several, which share out its
    query heads."""
    each = spec.heads // spec.kv_heads
    if spec.kv_heads >= rank.count:
        kv = _share(spec.kv_heads, rank)
        return HeadCut(_times(kv, each), kv, False)
    for head in range(spec.kv_heads):
        first, end = _share(rank.count, Rank(head, spec.kv_heads))
        if first <= rank.index < end:
            among = Rank(rank.index - first, end - first)
            begin, stop = _share(each, among)
            return HeadCut((head * each + begin, head * each + stop), (head, head + 1), among.index > 0)
    raise AssertionError(rank)


def intermediate_of(size: int, group: int, rank: Rank) -> Run:
    """Which elements of a feed-forward block are a rank's. The first ranks have more heads where these don't divide, so
    the last ones have more of it. `group`: of elements that share a scale, which stay together where that is fair."""
    groups = (math.lcm(group, MLP_UNITS[0]), math.lcm(group, MLP_UNITS[1]), group) if group else ()
    for unit in (*groups, *MLP_UNITS):
        units = -(-size // unit)
        if units >= rank.count and -(-units // rank.count) * unit <= MOST_EXCESS * size / rank.count:
            break
    each, more = divmod(units, rank.count)
    begin = rank.index * each + max(0, rank.index + more - rank.count)
    end = begin + each + (rank.index >= rank.count - more)
    return begin * unit, min(size, end * unit)


def _share(count: int, rank: Rank) -> Run:
    """Of so many, one rank's, the first ranks one more than the last where that is needed."""
    each, more = divmod(count, rank.count)
    begin = rank.index * each + min(rank.index, more)
    return begin, begin + each + (rank.index < more)


def _times(run: Run, unit: int) -> Run:
    return run[0] * unit, run[1] * unit
