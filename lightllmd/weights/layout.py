"""Which tensors of a checkpoint make which tensors of a decoder: what a family says of its weights. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightllmd.errors import WeightsInvalid
from lightllmd.weights.headers import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

Weight = tuple[str, "Tensor", "Tensor | None"]  # a target's key, its tensor, its bias
Progress = Callable[[int, int], None]  # (bytes of the checkpoint read, bytes in all)


@dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint, by its Hugging Face name, and the shape that the config makes it have."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """A tensor of the decoder: `parts` stacked along the first dimension, and likewise its bias if it has one."""

    key: str
    parts: tuple[Part, ...]
    bias: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Layout:
    targets: tuple[Target, ...]
    ignored: re.Pattern[str]  # names that may be in a checkpoint and are not needed

    def check(self, tensors: Mapping[str, TensorInfo], readable: Collection[str], place: str) -> None:
        """Every tensor there, with its shape and a type that can be read, and no other. Raises WeightsInvalid naming
        the tensor, its file or (where it has none) `place`."""
        wanted = {part.name: part for target in self.targets for part in target.parts + target.bias}
        missing = [part for part in wanted.values() if part.name not in tensors]
        if missing:
            raise WeightsInvalid(f"{place}: {_missing(missing)}")
        for part in wanted.values():
            found = tensors[part.name]
            if found.shape != part.shape:
                raise WeightsInvalid(
                    f"{found.file}: tensor {part.name} has shape {list(found.shape)}, "
                    f"the config says {list(part.shape)}"
                )
            if found.type not in readable:
                known = ", ".join(sorted(readable))
                raise WeightsInvalid(
                    f"{found.file}: tensor {part.name} is of type {found.type}, which is not available yet; "
                    f"available: {known}"
                )
        extra = [name for name in tensors if name not in wanted and not self.ignored.fullmatch(name)]
        if extra:
            found = tensors[extra[0]]
            more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
            raise WeightsInvalid(
                f"{found.file}: tensor {extra[0]} {list(found.shape)}{more} is in the checkpoint, "
                "but the config has no place for it"
            )


def _missing(parts: list[Part]) -> str:
    more = f" (and {len(parts) - 1} more)" if len(parts) > 1 else ""
    untied = "; the config does not say tie_word_embeddings = true" if parts[0].name == "lm_head.weight" else ""
    return f"tensor {parts[0].name}{more} is missing; expected shape {list(parts[0].shape)}{untied}"
