"""What a family says of its models, and what follows for one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lightllmd.architecture.heads import ScoredModel
from lightllmd.architecture.prefixes import PLAIN, Prefixes
from lightllmd.architecture.spec import DecoderSpec
from lightllmd.architecture.weights import Names, WeightSpec, weights_of


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp's converter stores a family."""

    names: Names  # as those of Hugging Face: llama.cpp's name of each tensor
    # Tensors whose rows it reorders within each head, so that the two elements of a rotary pair are adjacent.
    paired: frozenset[str] = frozenset()
    experts: str | None = None  # the model type of a file that says that it has experts; None: the family's own


@dataclass(frozen=True)
class Family:
    """Models of one Hugging Face ``model_type``."""

    model_type: str
    spec: Callable[[Mapping[str, Any]], DecoderSpec]  # of a config.json; raises ConfigInvalid
    names: Names
    ignored: str = r"(?!)"  # pattern of names that may be in a checkpoint and are not needed
    gguf: Gguf | None = None  # None: its GGUF files can't be read


@dataclass(frozen=True)
class Architecture:
    """One model: its decoder's specification, and the weights that follow from it."""

    family: Family
    spec: DecoderSpec
    scored: ScoredModel | None = None  # of a model that scores
    prefixes: Prefixes = PLAIN  # of the names that its checkpoint has
    untied: bool = False  # it has a head of its own although the config of its decoder says otherwise
    beside: str = r"(?!)"  # pattern of the names of its checkpoint that are no decoder's: of a vision tower
    held: tuple[WeightSpec, ...] = ()  # what one rank has of the weights; empty: it has all of them

    def of_files(self, headless: bool, prefixes: Prefixes, untied: bool = False) -> Architecture:
        """What a checkpoint's files make of it: one of the decoder alone has no head; `untied`: it has one of its own
        whatever the decoder's config says."""
        spec = replace(self.spec, headless=True, logit_soft_cap=None) if headless else self.spec
        spec = replace(spec, tied=False) if untied else spec
        return replace(self, spec=spec, prefixes=prefixes, untied=untied)

    @cached_property
    def weights(self) -> tuple[WeightSpec, ...]:
        """In the order in which they are loaded."""
        return self.held or weights_of(self.spec, self.names)

    @property
    def names(self) -> Names:
        """Of all tensors of a checkpoint."""
        names = self.family.names if self.scored is None else {**self.family.names, **self.scored.names}
        return names if self.prefixes == PLAIN else {kind: self.prefixes.text(name) for kind, name in names.items()}

    @cached_property
    def parameters(self) -> int:
        """Elements of all weights, a tied head counted once."""
        return sum(weight.elements for weight in self.weights)

    def ignores(self, name: str) -> bool:
        """Whether a tensor of this Hugging Face name may be in a checkpoint and is not needed."""
        # A tied head may be stored a second time, and one that scores may have kept the head it was made from.
        head = f"{self.prefixes.text(self.family.names['head'])}.weight"
        repeated = (self.spec.tied or self.scored is not None) and name == head
        return repeated or any(re.fullmatch(one, name) is not None for one in (self.family.ignored, self.beside))
