"""One rank's part of weights on their way: which are read as the part that it is, and which as a whole and then cut.

A quantised weight has on every rank the numbers that it has on one: where a part by itself would be quantised
otherwise, or lies in the files so that it can't be read by itself, the whole weight is read, and is there while it is
cut.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor

from lightllmd.architecture.weight_schemes import WeightSchemes
from lightllmd.architecture.weights import Part, WeightSpec
from lightllmd.kernels.quantised import QuantisedMatrix
from lightllmd.weights.loaded import LoadedWeight


def as_read(
    weights: Sequence[WeightSpec], schemes: WeightSchemes, stored_whole: Collection[str], columns: bool
) -> list[WeightSpec]:
    """How each of a rank's weights is read. `stored_whole`: names of parts that can be read as a whole only; `columns`:
    whether some columns of the others can be."""

    def read(weight: WeightSpec) -> WeightSpec:
        if weight.whole is None:
            return weight
        by_itself = not any(part.name in stored_whole for part in weight.parts) and _alike(weight, schemes)
        return weight if by_itself and (columns or weight.shard_axis == 0) else weight.whole

    return [read(weight) for weight in weights]


def _alike(weight: WeightSpec, schemes: WeightSchemes) -> bool:
    """Whether its part is quantised by itself as it is within the whole."""
    assert weight.whole is not None
    scheme = schemes.of(weight.whole)
    if scheme.dense or weight.shard_axis == 0:
        return scheme.rows == 1
    assert weight.parts[0].cut is not None
    ((begin, end),) = weight.parts[0].cut.runs
    size = weight.parts[0].cut.shape[1]
    return scheme.group > 0 and begin % scheme.group == 0 and (end % scheme.group == 0 or end == size)


def cut(loaded: Iterable[LoadedWeight], weights: Iterable[WeightSpec]) -> Iterator[LoadedWeight]:
    """Of each of `weights` what a rank has, of `loaded` as `as_read` said."""
    wanted = iter(weights)
    for whole in loaded:
        yield _cut(whole, next(wanted))
        del whole  # nothing is kept while the next is read


def _cut(loaded: LoadedWeight, weight: WeightSpec) -> LoadedWeight:
    if loaded.spec is weight:
        return loaded
    tensor, bias = loaded.tensor, loaded.bias if weight.bias else None
    if weight.shard_axis == 0:
        rows = _rows(weight)

        def some(whole: Tensor) -> Tensor:
            return whole.index_select(0, rows.to(whole.device))

        if bias is not None:
            bias = some(bias)
        if isinstance(tensor, QuantisedMatrix):
            return LoadedWeight(weight, tensor.by_rows(some), bias)
        more = sum(part.shape[0] for part in weight.parts) - len(rows)
        return LoadedWeight(weight, functional.pad(some(tensor), (*(0, 0) * (tensor.dim() - 1), 0, more)), bias)
    assert weight.parts[0].cut is not None
    ((begin, end),) = weight.parts[0].cut.runs
    if isinstance(tensor, QuantisedMatrix):
        return LoadedWeight(weight, tensor.columns(begin, end), bias)
    return LoadedWeight(weight, tensor[:, begin:end].clone(memory_format=torch.contiguous_format), bias)


def _rows(weight: WeightSpec) -> Tensor:
    """Which of the whole weight's rows, as the decoder has them, are a rank's."""
    assert weight.whole is not None
    stored = in_order(torch.arange(sum(part.shape[0] for part in weight.whole.parts)), weight.whole.groups)
    held, above = [], 0
    for part, whole in zip(weight.parts, weight.whole.parts, strict=True):
        held += [torch.arange(above + first, above + behind) for first, behind in _runs(part)]
        above += whole.shape[0]
    return stored.argsort()[in_order(torch.cat(held), weight.groups)]


def _runs(part: Part) -> tuple[tuple[int, int], ...]:
    return part.cut.runs if part.cut is not None else ((0, part.shape[0]),)


def in_order(rows: Tensor, groups: tuple[int, ...]) -> Tensor:
    """Rows as the decoder has them, of those of a checkpoint (`WeightSpec.groups`)."""
    if not groups:
        return rows
    kinds = rows.unflatten(0, (-1, sum(groups))).split(groups, 1)
    return torch.cat([kind.flatten(0, 1) for kind in kinds])
