"""A weight while it is read: rooms for the tensors of the files that it is made of, and what they become."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightllmd.architecture.weight_schemes import ALL_DENSE, WeightSchemes
from lightllmd.architecture.weights import Part, TensorCut, WeightSpec
from lightllmd.kernels.quantised import QuantisedMatrix, stacked
from lightllmd.weights.headers import TensorInfo
from lightllmd.weights.loaded import LoadedWeight, Rooms, room
from lightllmd.weights.plain import STORED_TYPES
from lightllmd.weights.quantised.form import Kind
from lightllmd.weights.quantised.stored import Matrices, StoredMatrix
from lightllmd.weights.quantised.unpack import unpack


@dataclass(frozen=True)
class Loading:
    """How weights are loaded."""

    dtype: torch.dtype  # of what is dense
    device: torch.device
    passing: Sequence[WeightSpec] = ()  # of which nothing is kept when the next is asked for (`Rooms`)
    matrices: Matrices = field(default_factory=dict)  # what the files don't hold as it is
    schemes: WeightSchemes = ALL_DENSE  # what of that stays quantised

    @property
    def rooms(self) -> Rooms:
        """New ones."""
        return Rooms(self.dtype, self.device, self.passing)


class Target(NamedTuple):
    """A tensor of the files, or what is wanted of it, and its room."""

    name: str
    out: Tensor
    cut: TensorCut | None = None


class ArrivingWeight:
    """Of one weight. When every tensor of `targets` has been filled, it is `whole`."""

    def __init__(self, weight: WeightSpec, how: Loading, rooms: Rooms) -> None:
        self._weight, self._how = weight, how
        self._raw: dict[str, dict[Kind, Tensor]] = {}  # of matrices, by the part's name
        self.targets: list[Target] = []
        quantised = [part for part in weight.parts if part.name in how.matrices]
        self._dense = not quantised or how.schemes.of(weight).dense
        self._tensor = self._filled(weight.parts, rooms.of(weight)) if self._dense else None
        self._bias = self._filled(weight.bias, room(weight.bias, how.dtype, how.device)) if weight.bias else None
        for part in quantised:
            self._raw[part.name] = self._rooms(how.matrices[part.name])

    def _filled(self, parts: tuple[Part, ...], out: Tensor) -> Tensor:
        """As far as the files hold it as it is."""
        for part, rows in zip(parts, out.split([part.shape[0] for part in parts]), strict=True):
            if part.name not in self._how.matrices:
                held = part.held_shape
                rows[held[0] :].zero_()
                self.targets.append(Target(part.name, rows[: held[0]], part.cut))
        return out

    def _rooms(self, matrix: StoredMatrix) -> dict[Kind, Tensor]:
        rooms: dict[Kind, Tensor] = {}
        for kind, info in matrix.tensors.items():
            rooms[kind] = torch.empty(info.shape, dtype=STORED_TYPES[info.type], device=self._how.device)
            self.targets.append(Target(info.name, rooms[kind]))
        return rooms

    def whole(self) -> LoadedWeight:
        """Raises WeightsInvalid where what was read is not as its format says. Lets go of what was read."""
        parts = self._weight.parts
        tensor: Tensor | QuantisedMatrix | None = self._tensor
        if self._tensor is None:
            tensor = stacked([self._unpacked(part) for part in parts])
        elif self._raw:
            for part, rows in zip(parts, self._tensor.split([part.shape[0] for part in parts]), strict=True):
                if part.name in self._raw:
                    rows.copy_(self._unpacked(part).dense(self._how.dtype))
        assert tensor is not None
        return LoadedWeight(self._weight, tensor, self._bias)

    def _unpacked(self, part: Part) -> QuantisedMatrix:
        # Scales of what becomes dense keep what the model's dtype may not hold.
        dtype = torch.float32 if self._dense else self._how.dtype
        return unpack(self._how.matrices[part.name], self._raw.pop(part.name), dtype)


def sources(weight: WeightSpec, matrices: Mapping[str, StoredMatrix]) -> list[str]:
    """Names of the tensors of the files that a weight is made of."""
    found: list[str] = []
    for part in weight.stored:
        matrix = matrices.get(part.name)
        found += [part.name] if matrix is None else [info.name for info in matrix.tensors.values()]
    return found


def source_bytes(weight: WeightSpec, tensors: Mapping[str, TensorInfo], matrices: Mapping[str, StoredMatrix]) -> int:
    """Of what is wanted of them."""
    wanted = {part.name: part for part in weight.stored}
    total = 0
    for name in sources(weight, matrices):
        info, part = tensors[name], wanted.get(name)
        share = (
            1 if part is None or part.cut is None else math.prod(part.held_shape) / max(1, math.prod(part.cut.shape))
        )
        total += round(info.nbytes * share)
    return total
