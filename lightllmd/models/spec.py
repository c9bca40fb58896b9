"""A decoder-only language model as data: what a family makes of a Hugging Face config and the decoder runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RopeKind = Literal["default", "linear", "dynamic", "llama3", "divided"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding and how it is stretched beyond the trained context.

    linear: every frequency divided by `factor` (Chen et al. 2023). dynamic: the base grows with the sequence's
    length ("NTK-aware"). llama3: low frequencies divided by `factor`, high ones kept, a ramp between.
    divided: frequency i divided by ``divisors[i]``.
    """

    kind: RopeKind
    dim: int  # rotated elements of a head
    base: float
    factor: float = 1.0
    original_context: int = 0  # tokens; dynamic and llama3
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True)
class DecoderSpec:
    """Sizes in elements. `heads` is a multiple of `kv_heads`; `head_dim` need not be ``hidden / heads``."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    norm_eps: float
    rope: RopeSpec
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"]
    qkv_bias: bool
    out_bias: bool  # of the attention's output projection
    mlp_bias: bool
    tied: bool  # the head's weight is the embedding
    qk_norm: bool = False  # an RMS norm over each query and key head, before the rotation

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5
