"""The parts of a decoder layer, and what a step looks like to them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightllmd.kernels.dispatch import Kernels
from lightllmd.kernels.linear import Linear
from lightllmd.models.spec import DecoderSpec, RopeSpec

Slots = Tensor | slice  # slots of the cache: their numbers, or a run of them


@dataclass
class DecodeGroup:
    """B rows that feed one token each, read together because their lengths are alike. Set by the runner."""

    tokens: Tensor | None  # [B], which of the packed tokens; None: all of them, in order
    slots: Slots  # [B * L]: each row's slots, padded to L with its own first one; a run only where B is 1
    mask: Tensor | None  # [B, 1, 1, L], 0 or -inf; None where every row has length L


@dataclass
class PrefillRow:
    """One row that feeds `count` tokens, packed from `first` on, behind `start` cached ones. Set by the runner."""

    first: int
    count: int
    start: int
    slots: Slots  # [start + count]


@dataclass
class Packed:
    """One step: the tokens of all rows one after another, T in all. Set by the runner, read by the decoder."""

    tokens: Tensor  # [T] int
    slots: Tensor  # [T] int64, where each token's keys and values go
    cos: Tensor  # [T, 1, D]
    sin: Tensor  # [T, 1, D], the first half negated
    decode: list[DecodeGroup]
    prefill: list[PrefillRow]
    sampled: Tensor | None  # [R], the tokens whose next token is asked for; None: all


class Rope:
    """Angles of the rotary embedding. Where they depend on a sequence's length (`dynamic`), see `angles`."""

    def __init__(self, spec: RopeSpec, device: torch.device, dtype: torch.dtype) -> None:
        self.spec, self.dtype = spec, dtype
        self._exponents = torch.arange(0, spec.dim, 2, device=device).float() / spec.dim
        self._frequencies = _frequencies(spec, self._exponents)

    @property
    def by_length(self) -> bool:
        return self.spec.kind == "dynamic"

    def angles(self, positions: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """(cos, sin) ``[T, 1, D]`` for ``positions [T]``.

        `lengths` [T] is read by `dynamic` alone: how long the sequence was when the token first entered, the whole
        prompt for a prompt's token, its position + 1 for a generated one. So a token's angles never change, whether
        it is decoded, or fed again after a pause or a replay, or behind a cached prefix; they are those of
        transformers' generate with its cache, which keeps the keys that it rotated earlier.
        """
        if self.by_length:
            assert lengths is not None
            frequencies = _dynamic_frequencies(self.spec, self._exponents, lengths)
        else:
            frequencies = self._frequencies
        half = positions[:, None].float() * frequencies
        cos, sin = half.cos(), half.sin()
        return (
            torch.cat([cos, cos], -1).unsqueeze(1).to(self.dtype),
            torch.cat([-sin, sin], -1).unsqueeze(1).to(self.dtype),
        )


def _frequencies(spec: RopeSpec, exponents: Tensor) -> Tensor:
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


def _dynamic_frequencies(spec: RopeSpec, exponents: Tensor, lengths: Tensor) -> Tensor:
    """``[T, D / 2]``: the base grows with the length beyond the original context."""
    stretched = spec.factor * lengths.clamp(min=spec.original_context).float() / spec.original_context
    base = spec.base * (stretched - (spec.factor - 1)) ** (spec.dim / (spec.dim - 2))
    return 1.0 / base[:, None] ** exponents


@dataclass
class DecoderLayer:
    """Weights of one layer; `forward` maps the residual stream ``[T, hidden]`` to the next."""

    spec: DecoderSpec
    kernels: Kernels
    input_norm: Tensor
    qkv: Linear
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear

    def forward(self, x: Tensor, cache: Tensor, batch: Packed) -> Tensor:
        spec, kernels = self.spec, self.kernels
        attended = self._attention(self.qkv(kernels.rms_norm(x, self.input_norm, spec.norm_eps)), cache, batch)
        x = self.out(attended, x)
        hidden = self.gate_up(kernels.rms_norm(x, self.mlp_norm, spec.norm_eps))
        return self.down(kernels.gated(hidden, spec.activation), x)

    def _attention(self, qkv: Tensor, cache: Tensor, batch: Packed) -> Tensor:
        spec, kernels = self.spec, self.kernels
        qkv = qkv.view(-1, spec.heads + 2 * spec.kv_heads, spec.head_dim)
        kernels.rotate_(qkv[:, : spec.heads + spec.kv_heads], batch.cos, batch.sin)
        kernels.write_kv(cache, batch.slots, qkv[:, spec.heads :])
        q, scale = qkv[:, : spec.heads], spec.attention_scale
        if len(batch.decode) == 1 and batch.decode[0].tokens is None:
            group = batch.decode[0]
            return kernels.decode_attention(q, cache, group.slots, group.mask, scale).flatten(1)
        attended = torch.empty_like(q)
        for group in batch.decode:
            rows = kernels.decode_attention(q[group.tokens], cache, group.slots, group.mask, scale)
            attended[group.tokens] = rows
        for row in batch.prefill:
            span = slice(row.first, row.first + row.count)
            attended[span] = kernels.prefill_attention(q[span], cache, row.slots, row.start, scale)
        return attended.flatten(1)
