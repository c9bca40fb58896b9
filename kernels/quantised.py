"""A weight as a scheme stores it, before a device packs it: made of a dense one, or read out of a checkpoint.

Rounding is to the nearest, halves to even. Of the original's modes that quantise while they load only names,
granularity and symmetry are kept: it cut towards zero, which costs twice the error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as functional
from torch import Tensor

from lightllmd.architecture.schemes import FILLED_COLUMNS, Scheme

VERSION = 1  # of what `quantise` makes: counted on when that changes, so that what was kept is made again
LEVELS = {"int8": 127.0, "float8_e4m3fn": 448.0}  # the largest value that a scale maps to, of symmetric schemes
UNSIGNED = {"uint4": 15, "uint8": 255}  # the largest value of schemes that are not symmetric
ZEROS = {"uint4": torch.uint8, "uint8": torch.int16}  # how `QuantisedMatrix` has the zeros of such values
# Inputs that are all smaller get the scale of this one: its inverse is finite, and so is that of zeros.
SMALLEST_INPUT = 2.0**-100
# Quantised at a time, by kind of device: temporaries in fp32 take a few times as many bytes. A CPU's stay in its cache,
# and leave no holes among what is kept.
CHUNK_ELEMENTS = {"cpu": 256 << 10, "cuda": 4 << 20}


@dataclass(frozen=True, eq=False)
class QuantisedMatrix:
    """A weight ``[N, K]`` of N outputs and K inputs; G = ``scheme.groups(K)``. All tensors are on one device.

    Each row has scales of its own here, also where the scheme gives several rows the same (`Scheme.rows`), so that
    weights may be stacked and cut by rows.
    """

    scheme: Scheme
    values: Tensor  # [N, K], one value an element: int8, uint8 (of "uint4", 0 to 15) or float8_e4m3fn
    scales: Tensor  # [N, G], in the dtype that the scheme names, the model's where it names none
    # [N, G] of schemes that are not symmetric: uint8, of "uint8" int16. 16 and 256 are possible (GPTQ).
    zeros: Tensor | None = None
    # [K] int32, of schemes that are ordered: column k is multiplied with input ``order[k]``
    order: Tensor | None = None
    input_scale: Tensor | None = None  # [] fp32, of schemes with static inputs: x stands for ``input_scale * value``

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        rows, columns = self.values.shape
        return rows, columns

    def dense(self, dtype: torch.dtype) -> Tensor:
        """``[N, K]`` of the numbers that it stands for, rounded to `dtype` once, in the order of the inputs."""
        values = self.values.to(torch.float32)
        group = self.scheme.group or values.shape[1]
        if self.zeros is not None:
            values -= _spread(self.zeros.to(torch.float32), group, values.shape[1])
        values *= _spread(self.scales.to(torch.float32), group, values.shape[1])
        if self.order is not None:
            values = torch.empty_like(values).index_copy_(1, self.order.long(), values)
        return values.to(dtype)

    def by_rows(self, change: Callable[[Tensor], Tensor]) -> QuantisedMatrix:
        """With its rows changed: `change` gets each tensor that has one for each, such as values and scales."""
        zeros = None if self.zeros is None else change(self.zeros)
        return replace(self, values=change(self.values), scales=change(self.scales), zeros=zeros)

    def columns(self, begin: int, end: int) -> QuantisedMatrix:
        """Of these inputs alone, in memory of its own. Where they begin inside a group its scales are those of smaller
        groups. If it is ordered, `order` has ``end - begin`` for columns that it is filled up with."""
        if self.order is not None:
            return self._ordered_columns(begin, end)
        whole, scheme = self.scheme.group or self.shape[1], self.scheme.cut(begin)
        firsts = torch.arange(begin, end, scheme.group or end - begin, device=self.values.device)
        values = self.values[:, begin:end].clone(memory_format=torch.contiguous_format)
        return self._some(scheme, values, firsts // whole)

    def _ordered_columns(self, begin: int, end: int) -> QuantisedMatrix:
        assert self.order is not None
        whole, scheme = self.scheme.group or self.shape[1], self.scheme.cut(begin)
        each = scheme.group or end - begin
        held = ((self.order >= begin) & (self.order < end)).nonzero().flatten()
        # Of each group the columns that are held, and filled up to a multiple of `each`.
        counts = (held // whole).bincount(minlength=-(-self.shape[1] // whole))
        smaller = -(-counts // each)
        more = -int(smaller.sum()) * each % FILLED_COLUMNS // each if scheme.group else 0
        groups = torch.arange(len(counts), device=held.device).repeat_interleave(smaller)
        groups = torch.cat([groups, groups[-1:].expand(more)])
        starts = (smaller.cumsum(0) - smaller) * each - (counts.cumsum(0) - counts)  # of columns among `held`
        places = torch.arange(len(held), device=held.device) + starts[held // whole]
        columns = held.new_zeros(len(groups) * each).index_copy_(0, places, held)
        order = torch.full_like(columns, end - begin).index_copy_(0, places, self.order[held].long() - begin)
        return replace(self._some(scheme, self.values.index_select(1, columns), groups), order=order.int())

    def _some(self, scheme: Scheme, values: Tensor, groups: Tensor) -> QuantisedMatrix:
        zeros = None if self.zeros is None else self.zeros.index_select(1, groups)
        return replace(self, scheme=scheme, values=values, scales=self.scales.index_select(1, groups), zeros=zeros)

    def unordered(self) -> QuantisedMatrix:
        """Without its order: of inputs that are in it."""
        return replace(self, scheme=replace(self.scheme, ordered=False), order=None)

    def to(self, device: torch.device) -> QuantisedMatrix:
        """On that device; itself where it is there."""
        order = None if self.order is None else self.order.to(device)
        static = None if self.input_scale is None else self.input_scale.to(device)
        return replace(self.by_rows(lambda rows: rows.to(device)), order=order, input_scale=static)


def empty(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> QuantisedMatrix:
    """For a matrix ``[N, K]`` of this shape, in a model of `dtype`."""
    rows, columns = shape
    kind = getattr(torch, scheme.scales) if scheme.scales else dtype
    stored = torch.uint8 if scheme.values in UNSIGNED else getattr(torch, scheme.values)
    values = torch.empty(shape, dtype=stored, device=device)
    scales = torch.empty((rows, scheme.groups(columns)), dtype=kind, device=device)
    zeros = None if scheme.symmetric else torch.empty_like(scales, dtype=ZEROS[scheme.values])
    order = torch.empty(columns, dtype=torch.int32, device=device) if scheme.ordered else None
    static = torch.empty((), dtype=torch.float32, device=device) if scheme.static else None
    return QuantisedMatrix(scheme, values, scales, zeros, order, static)


def stacked(parts: list[QuantisedMatrix]) -> QuantisedMatrix:
    """One below the other. All have the same scheme, and inputs in the same order."""
    first = parts[0]
    zeros = None if first.zeros is None else torch.cat([part.zeros for part in parts if part.zeros is not None])
    values, scales = (torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts]))
    return replace(first, values=values, scales=scales, zeros=zeros)


def quantise(weight: Tensor, scheme: Scheme) -> QuantisedMatrix:
    """A dense weight ``[N, K]``, which is not kept, stored by `scheme`. Beside the result it takes memory for
    `CHUNK_ELEMENTS` alone. Where a group holds what is no number its scale is none either."""
    rows, columns = weight.shape
    made = empty(scheme, (rows, columns), weight.dtype, weight.device)
    at_once = max(1, CHUNK_ELEMENTS[weight.device.type] // max(1, columns * scheme.rows)) * scheme.rows
    for begin in range(0, rows, at_once):
        part = slice(begin, begin + at_once)
        if made.zeros is None:
            _symmetric(weight[part], scheme, made.values[part], made.scales[part])
        else:
            _asymmetric(weight[part], scheme, made.values[part], made.scales[part], made.zeros[part])
    order, input_scale = _calibrated(made.values, scheme)
    return replace(made, order=order, input_scale=input_scale)


def _asymmetric(weight: Tensor, scheme: Scheme, values: Tensor, scales: Tensor, zeros: Tensor) -> None:
    padded, most = _in_groups(weight, scheme), UNSIGNED[scheme.values]
    low, high = padded.amin(2).clamp_(max=0), padded.amax(2).clamp_(min=0)
    scales.copy_(_not_zero(_divided(high.sub_(low), most).to(scales.dtype)))
    exact = scales.float()
    shift = low.neg_().div_(exact).round_().clamp_(0, most)
    zeros.copy_(shift)
    padded = padded.div_(exact[..., None]).round_().add_(shift[..., None]).clamp_(0, most)
    values.copy_(_cut(padded, values.shape[1]))


def _symmetric(weight: Tensor, scheme: Scheme, values: Tensor, scales: Tensor) -> None:
    padded = _in_groups(weight, scheme)
    largest = torch.maximum(padded.amax(2), padded.amin(2).neg_())
    if scheme.rows > 1:
        rows = len(weight)
        blocks = functional.pad(largest, (0, 0, 0, -rows % scheme.rows)).unflatten(0, (-1, scheme.rows))
        largest = blocks.amax(1).repeat_interleave(scheme.rows, 0)[:rows]
    level = LEVELS[scheme.values]
    scales.copy_(_not_zero(_divided(largest, level).to(scales.dtype)))
    padded = padded.div_(scales.float()[..., None]).clamp_(-level, level)
    if scheme.values == "int8":
        padded.round_()
    values.copy_(_cut(padded, values.shape[1]))


def quantised_inputs(
    x: Tensor, scheme: Scheme, scale: Tensor | None = None, largest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``x [T, K]`` -> values ``[T, K]`` of the dtype that the scheme rounds inputs to, and fp32 scales ``[T, G]``;
    `scale`: the one of all, of static inputs, beyond which values are cut. `largest`: fp32 ``[T, G]``, the magnitudes
    that scales are made of where that is more than is here.

    A token's own scale is the largest magnitude of a group over the largest value, and x is multiplied with its inverse
    in fp32. If a group holds an infinity or what is no number, its scale is that, and so are the outputs of the token:
    int8 has no values for them.
    """
    group = scheme.group or x.shape[1]
    level = LEVELS[scheme.inputs]
    padded = functional.pad(x.float(), (0, -x.shape[1] % group)).unflatten(1, (-1, group))
    largest = (padded.abs().amax(2) if largest is None else largest).clamp(min=SMALLEST_INPUT)
    if scale is None:
        scales, least = _divided(largest, level), -level
        values = padded * (torch.full_like(largest, level) / largest)[..., None]
    else:
        # A token's own scale reaches its largest value; one that was fixed before may use -128, too.
        scales, least = torch.where(largest.isfinite(), scale, largest), -128.0 if scheme.inputs == "int8" else -level
        values = padded / scale
    values = values.clamp_(least, level)
    if scheme.inputs == "int8":
        values = values.round_().nan_to_num_(nan=0.0)
    return _cut(values, x.shape[1]).to(getattr(torch, scheme.inputs)), scales


def _calibrated(values: Tensor, scheme: Scheme) -> tuple[Tensor | None, Tensor | None]:
    """Order and scale of inputs of a weight that no calibration was made for: columns as they are, and inputs up to
    16 within reach."""
    device = values.device
    order = torch.arange(values.shape[1], dtype=torch.int32, device=device) if scheme.ordered else None
    return order, torch.tensor(16 / LEVELS[scheme.inputs], device=device) if scheme.static else None


def _in_groups(weight: Tensor, scheme: Scheme) -> Tensor:
    """A copy in fp32, ``[N, G, group]``, padded with zeros."""
    columns = weight.shape[1]
    group = scheme.group or columns
    return functional.pad(weight.to(torch.float32, copy=True), (0, -columns % group)).unflatten(1, (-1, group))


def _divided(largest: Tensor, level: float) -> Tensor:
    """Rounded once, on every device: by a number of the host's, CUDA multiplies with that number's reciprocal."""
    return largest / torch.full((), level, device=largest.device)


def _not_zero(scales: Tensor) -> Tensor:
    """A group of zeros alone may have any scale but 0."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _cut(groups: Tensor, columns: int) -> Tensor:
    return groups.flatten(1)[:, :columns]


def _spread(scales: Tensor, group: int, columns: int) -> Tensor:
    """``[N, G]`` -> ``[N, columns]``."""
    return scales.repeat_interleave(group, 1)[:, :columns]
