"""Angles of rotary positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightllmd.architecture.spec import Rotary


class Rope:
    """Angles of the rotary embedding. Where they depend on a sequence's length (`dynamic`), see `cos_sin`.

    `others`: of a model whose layers have several kinds of positions; they are "default", "linear" or "llama3"."""

    def __init__(self, spec: Rotary, device: torch.device, others: Sequence[Rotary] = ()) -> None:
        self.spec = spec
        self._others = [Rope(other, device) for other in others]
        self._exponents = torch.arange(0, spec.dim, 2, device=device).float() / spec.dim
        self._frequencies = _frequencies(spec, self._exponents)
        self._axes = torch.tensor(spec.axes, device=device, dtype=torch.int64)

    @property
    def pairs(self) -> int:
        """Frequencies."""
        return self.spec.dim // 2

    @property
    def by_length(self) -> bool:
        """Whether a token's angles depend on how long its sequence is."""
        return self.spec.kind == "dynamic"

    @property
    def in_grids(self) -> bool:
        """Whether a token of an image has three positions: see `Rotary.axes`."""
        return bool(self.spec.axes)

    def cos_sin(self, positions: Tensor, lengths: Tensor | None = None) -> Tensor:
        """fp32 ``[T, D]`` for ``positions [T]``, or for ``[3, T]`` where they may be `in_grids`: the cosines of half a
        head, then the sines; ``[T, N D]`` of N kinds of positions, one behind the other. Of a token whose three
        positions are equal they are those of the one.

        `lengths` [T] is read by `dynamic` alone: how long the sequence was when the token first entered, the whole
        prompt for a prompt's token, its position + 1 for a generated one. So a token's angles never change, whether
        it is decoded, or computed again after a pause or a replay, or after a cached prefix; they are those of
        transformers' generate with its cache, which keeps the keys that it rotated earlier.
        """
        if self.by_length:
            assert lengths is not None
            frequencies = _dynamic_frequencies(self.spec, self._exponents, lengths)
        else:
            frequencies = self._frequencies
        by_pair = positions[self._axes].T if positions.dim() == 2 else positions[:, None]
        half = by_pair.float() * frequencies
        turned = torch.cat([half.cos(), half.sin()], -1)
        return (
            torch.cat([turned, *(other.cos_sin(positions) for other in self._others)], -1) if self._others else turned
        )


class NoRope:
    """Angles of 0, for a model that has its positions elsewhere: heads are stored as they are."""

    by_length = in_grids = False

    def __init__(self, dim: int) -> None:
        self._dim = dim

    def cos_sin(self, positions: Tensor, lengths: Tensor | None = None) -> Tensor:
        """As `Rope.cos_sin`."""
        half = torch.ones((len(positions), self._dim // 2), device=positions.device)
        return torch.cat([half, torch.zeros_like(half)], -1)


def _frequencies(spec: Rotary, exponents: Tensor) -> Tensor:
    plain = 1.0 / spec.base**exponents
    if spec.kind == "linear":
        return plain / spec.factor
    if spec.kind == "divided":
        return plain / torch.tensor(spec.divisors, device=plain.device)
    if spec.kind == "llama3":
        wavelength = 2 * math.pi / plain
        ramp = (spec.original_context / wavelength - spec.low_freq_factor) / (
            spec.high_freq_factor - spec.low_freq_factor
        )
        ramp = ramp.clamp(0.0, 1.0)
        return (1 - ramp) * plain / spec.factor + ramp * plain
    return plain


def _dynamic_frequencies(spec: Rotary, exponents: Tensor, lengths: Tensor) -> Tensor:
    """``[T, D / 2]``: the base grows with the length beyond the original context."""
    stretched = spec.factor * lengths.clamp(min=spec.original_context).float() / spec.original_context
    base = spec.base * (stretched - (spec.factor - 1)) ** (spec.dim / (spec.dim - 2))
    return 1.0 / base[:, None] ** exponents
