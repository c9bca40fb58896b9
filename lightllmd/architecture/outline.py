"""What is known of a model that transformers' own modules compute: its attention, what its weights and a step take.

It is read off a run of the modules without weights (`models.hf.dry_run`): what they do, not what a config says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from lightllmd.architecture.heads import ScoredModel
from lightllmd.architecture.spec import GroupedQuery, ScoreHead


@dataclass(frozen=True)
class StepBytes:
    """What a step of T tokens takes at its worst moment, attention apart: ``fixed + T * each`` bytes."""

    fixed: int
    each: int

    def of(self, tokens: int) -> int:
        """Of a step of so many tokens."""
        return self.fixed + tokens * self.each


@dataclass(frozen=True)
class Outline:
    """A causal language model of transformers, or one that a checkpoint's own code defines."""

    architecture: str  # the class, such as "MixtralForCausalLM"
    base: str  # the module that ends in hidden states, by its name in the model; what remains of the model is its head
    vocab: int
    hidden: int  # elements of such a state
    # Of each call of attention in a forward, in their order. `head_dim` is the larger one of keys and values, which are
    # stored alike.
    attention: tuple[GroupedQuery, ...]
    parameters: int  # elements, those of tied weights once
    constant_bytes: int  # of the model beside its parameters, such as rotary tables
    step: dict[str, StepBytes]  # by the dtype of the elements
    # Beyond so many tokens the rotary angles of a token would depend on its sequence's length; None: they never do.
    longest: int | None = None
    context: int | None = None  # tokens that the model was made for, where its config says so

    headless: bool = False  # its checkpoint holds the base alone, whose hidden states are what is wanted

    scores: ClassVar[ScoreHead | None] = None
    scored: ClassVar[ScoredModel | None] = None

    @property
    def generates(self) -> bool:
        """It ends in logits."""
        return not self.headless

    def weight_bytes(self, item: int) -> int:
        """Of weights with elements of `item` bytes."""
        return self.parameters * item + self.constant_bytes

    def padded(self, head_dims: Iterable[int]) -> Outline:
        """With each head's size the next larger one of `head_dims`, if there is one: the rest of a head is zeros."""

        def wider(attention: GroupedQuery) -> GroupedQuery:
            return replace(
                attention,
                head_dim=min((dim for dim in head_dims if dim >= attention.head_dim), default=attention.head_dim),
            )

        return replace(self, attention=tuple(wider(each) for each in self.attention))


@dataclass(frozen=True)
class Outlined:
    """What became of looking at a model: its outline, or why it can't be served."""

    outline: Outline | None = None
    refused: str = ""
    damaged: bool = False  # what is refused are the tensors of its files
