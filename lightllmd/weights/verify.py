"""Whether a checkpoint holds the weights of an architecture. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lightllmd.architecture.family import Architecture
from lightllmd.architecture.weights import Part, WeightSpec
from lightllmd.errors import WeightsInvalid, show
from lightllmd.weights.headers import TensorInfo


def verify(
    architecture: Architecture, tensors: Mapping[str, TensorInfo], readable: Collection[str], place: str
) -> None:
    """Every tensor is there, with its shape and a type of `readable`, and no other. Raises WeightsInvalid naming the
    tensor, its file or (where it has none) `place`."""
    wanted = {part.name: part for weight in architecture.weights for part in weight.stored}
    missing = [(weight, part) for weight in architecture.weights for part in weight.stored if part.name not in tensors]
    if missing:
        raise WeightsInvalid(f"{place}: {_missing(missing)}")
    for part in wanted.values():
        found = tensors[part.name]
        if found.shape != part.shape:
            raise WeightsInvalid(
                f"{found.file}: tensor {part.name} has shape {list(found.shape)}, the config says {list(part.shape)}"
            )
        if found.type not in readable:
            known = ", ".join(sorted(readable))
            raise WeightsInvalid(
                f"{found.file}: tensor {part.name} is of type {found.type}, which is not available yet; "
                f"available: {known}"
            )
    extra = [name for name in tensors if name not in wanted and not architecture.ignores(name)]
    if extra:
        found = tensors[extra[0]]
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        shown = show(extra[0]).strip('"')  # a file may call it anything
        raise WeightsInvalid(
            f"{found.file}: tensor {shown} {list(found.shape)}{more} is in the checkpoint, "
            "but the config has no place for it"
        )


def _missing(tensors: list[tuple[WeightSpec, Part]]) -> str:
    weight, part = tensors[0]
    more = f" (and {len(tensors) - 1} more)" if len(tensors) > 1 else ""
    untied = "; the config does not say tie_word_embeddings = true" if weight.role == "head" else ""
    return f"tensor {part.name}{more} is missing; expected shape {list(part.shape)}{untied}"
