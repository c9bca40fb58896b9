"""How a format stores a matrix: its tensors, and the scheme that they amount to. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lightllmd.architecture.schemes import Scheme

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
WORDS = frozenset({"I32"})
Kind = Literal["values", "scales", "zeros", "groups", "input_scale", "input_zero", "shape"]
Shape = tuple[int, ...]
NOTHING = r"(?!)"  # a pattern that no name has
ONE: tuple[Shape, ...] = ((), (1,), (1, 1))  # how a single number may be stored


@dataclass(frozen=True)
class FormTensor:
    """A tensor among those of a matrix."""

    kind: Kind  # what it is to `unpack`; "groups": the group of each input
    names: tuple[str, ...]  # behind the module's name; a file has one of them, the first if in doubt
    types: frozenset[str]  # as a safetensors header has them
    shapes: tuple[Shape, ...]  # any of them
    optional: bool = False


class Form(ABC):
    """Of a matrix ``[rows, columns]``, whose module's name is in front of the names of its tensors."""

    scheme: Scheme

    @abstractmethod
    def fields(self, rows: int, columns: int) -> tuple[FormTensor, ...]:
        """Its tensors, the values first."""


@dataclass(frozen=True)
class CheckpointQuantisation:
    """What a checkpoint's settings say."""

    words: str  # of all of it, for the start-up report
    # The form of a module's matrix; None: it is stored as it is. `embedding`: it is one of tokens, else a linear.
    form: Callable[[str, bool], Form | None]
    ignored: str = NOTHING  # pattern of names of tensors that may be there beside and are not needed
    notes: tuple[str, ...] = ()  # what else the start-up report should say


def words_of(values: int, per_word: int) -> int:
    """32-bit words of so many values."""
    return -(-values // per_word)


def scale_shapes(rows: int, groups: int, grouped: bool) -> tuple[Shape, ...]:
    """Of a scale for each row and group, or for each row, or one for all where there are no groups."""
    return ((rows, groups),) if grouped else (*ONE, (rows,), (rows, 1))
