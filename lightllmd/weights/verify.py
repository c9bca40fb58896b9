"""Whether a checkpoint holds the weights of an architecture. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from lightllmd.architecture.family import Architecture
from lightllmd.architecture.vision.family import VisionFamily
from lightllmd.architecture.vision.spec import VisionSpec
from lightllmd.architecture.weights import WeightSpec
from lightllmd.errors import WeightsInvalid, show
from lightllmd.weights.headers import TensorInfo
from lightllmd.weights.quantised.form import NOTHING
from lightllmd.weights.quantised.stored import Matrices, zero_biases


@dataclass(frozen=True)
class _Wanted:
    """A tensor that a file should hold."""

    weight: WeightSpec
    name: str
    shapes: tuple[tuple[int, ...], ...]  # any of them
    types: Collection[str]
    says: str  # what says so
    optional: bool = False


def verify(
    architecture: Architecture,
    tensors: Mapping[str, TensorInfo],
    readable: Collection[str],
    place: str,
    matrices: Matrices | None = None,
    ignored: str = NOTHING,
) -> None:
    """Every tensor is there, with its shape and a type of `readable`, and no other. `matrices`: what is stored
    otherwise, with tensors, shapes and types of its own; `ignored`: pattern of names that may be there beside. Raises
    WeightsInvalid naming the tensor, its file or (where it has none) `place`."""
    wanted = {one.name: one for one in _wanted(architecture.weights, readable, matrices or {})}
    _require(wanted, tensors, place)
    extra = [name for name in tensors if name not in wanted and not architecture.ignores(name)]
    extra = [name for name in extra if not re.fullmatch(ignored, name)]
    if extra and matrices:
        zeros = zero_biases(matrices, tensors)
        extra = [name for name in extra if name not in zeros]
    _refuse_extra(extra, tensors)


def verify_vision(
    spec: VisionSpec, family: VisionFamily, tensors: Mapping[str, TensorInfo], readable: Collection[str], place: str
) -> None:
    """As `verify`, of tower and connector. Raises WeightsInvalid."""
    wanted = {one.name: one for one in _wanted(spec.weights, readable, {})}
    _require(wanted, tensors, place)
    owned = [name for name in tensors if name not in wanted and re.fullmatch(family.owned, name)]
    _refuse_extra([name for name in owned if not re.fullmatch(family.ignored, name)], tensors)


def _require(wanted: Mapping[str, _Wanted], tensors: Mapping[str, TensorInfo], place: str) -> None:
    missing = [one for one in wanted.values() if one.name not in tensors and not one.optional]
    if missing:
        raise WeightsInvalid(f"{place}: {_missing(missing)}")
    for one in wanted.values():
        found = tensors.get(one.name)
        if found is None:
            continue
        if found.shape not in one.shapes:
            shapes = " or ".join(str(list(shape)) for shape in one.shapes)
            raise WeightsInvalid(f"{found.file}: tensor {one.name} has shape {list(found.shape)}, {one.says} {shapes}")
        if found.type not in one.types:
            known = ", ".join(sorted(one.types))
            raise WeightsInvalid(
                f"{found.file}: tensor {one.name} is of type {found.type}, which is not available yet; "
                f"available: {known}"
            )


def _refuse_extra(extra: list[str], tensors: Mapping[str, TensorInfo]) -> None:
    if extra:
        found = tensors[extra[0]]
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        shown = show(extra[0]).strip('"')  # a file may call it anything
        raise WeightsInvalid(
            f"{found.file}: tensor {shown} {list(found.shape)}{more} is in the checkpoint, "
            "but the config has no place for it"
        )


def _wanted(weights: Iterable[WeightSpec], readable: Collection[str], matrices: Matrices) -> Iterator[_Wanted]:
    for weight in weights:
        for part in weight.stored:
            matrix = matrices.get(part.name)
            if matrix is None:
                yield _Wanted(weight, part.name, (part.shape,), readable, "the config says")
                continue
            for field in matrix.fields:
                says = "config and quantisation say"
                yield _Wanted(weight, matrix.name(field), field.shapes, field.types, says, field.optional)


def _missing(tensors: list[_Wanted]) -> str:
    first = tensors[0]
    more = f" (and {len(tensors) - 1} more)" if len(tensors) > 1 else ""
    untied = "; the config does not say tie_word_embeddings = true" if first.weight.role == "head" else ""
    return f"tensor {first.name}{more} is missing; expected shape {list(first.shapes[0])}{untied}"
