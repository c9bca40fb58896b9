"""Which tensors of a checkpoint make which tensors of a decoder: what a family says of its weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Progress = Callable[[int, int], None]  # (bytes of the checkpoint read, bytes in all)
Weight = tuple[str, Tensor, Tensor | None]  # a target's key, its tensor, its bias


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
