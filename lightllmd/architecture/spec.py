"""A decoder-only language model as data: what a family makes of a Hugging Face config, and what everything else reads.

The vocabulary names only what is built. A new kind of attention, feed-forward block or positions is a class of its own
beside those here, added to the union below them. What a config asks for beyond that is refused by its family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RotaryKind = Literal["default", "linear", "dynamic", "llama3", "divided"]
NormPlacement = Literal["pre", "pre_post", "post"]
QkNorm = Literal["head", "projection"]


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al. 2021) and how it is stretched beyond the trained context.

    linear: every frequency divided by `factor` (Chen et al. 2023). dynamic: the base grows with the sequence's
    length ("NTK-aware"). llama3: low frequencies divided by `factor`, high ones kept, a ramp between.
    divided: frequency i divided by ``divisors[i]``.

    With `axes` a token's position is three numbers (frame, row, column of an image; three equal ones of text), and
    frequency i is that of number ``axes[i]`` (Wang et al. 2024, "Qwen2-VL", multimodal rotary position embedding).
    """

    kind: RotaryKind
    dim: int  # rotated elements of a head
    base: float
    factor: float = 1.0
    original_context: int = 0  # tokens; dynamic and llama3
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    divisors: tuple[float, ...] = ()
    axes: tuple[int, ...] = ()  # [dim / 2], each 0, 1 or 2; empty: a position is one number


@dataclass(frozen=True)
class RmsNorm:
    """Root mean square norm (Zhang and Sennrich 2019): ``x / rms(x) * (offset + weight)``."""

    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class SharedHeads:
    """Of attention whose heads several ranks share: those of all ranks together."""

    heads: int
    kv_heads: int
    repeats: bool  # the rank before this one has the same KV head, too


@dataclass(frozen=True)
class GroupedQuery:
    """Attention whose query heads share keys and values in groups (Ainslie et al. 2023).

    `heads` is a multiple of `kv_heads`; `head_dim` need not be ``hidden / heads``.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # of the attention logits
    qkv_bias: bool = False
    out_bias: bool = False
    # An RMS norm of queries and one of keys before the rotation: over each head, or over all heads together.
    qk_norm: QkNorm | None = None
    window: int | None = None  # tokens that a query sees, its own included; None: all before it
    soft_cap: float | None = None  # attention logits become ``soft_cap * tanh(logits / soft_cap)``
    rotary: int = 0  # which rotary positions it has: 0 for `DecoderSpec.positions`, n for the nth of the others
    shared: SharedHeads | None = None  # where `heads` and `kv_heads` are one rank's

    @property
    def q_size(self) -> int:
        """Elements of one token's queries, in all heads."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of one token's keys, in all heads; its values have as many."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class GatedMlp:
    """``down(activation(gate(x)) * up(x))`` (Shazeer 2020)."""

    intermediate: int
    activation: Activation
    bias: bool = False


@dataclass(frozen=True)
class ScoreHead:
    """What is behind the last norm instead of a language model head: a linear to the values of a vector, in fp32; with
    `inner` one to so many elements and ReLU before it."""

    values: int
    inner: int | None = None
    bias: bool = False


Positions = Rotary
Attention = GroupedQuery
FeedForward = GatedMlp


@dataclass(frozen=True)
class LayerSpec:
    """One layer: attention, then a feed-forward block."""

    attention: Attention
    feed_forward: FeedForward


@dataclass(frozen=True)
class DecoderSpec:
    """Sizes in elements. `norm_placement` says where a layer has its norms: "pre", before attention and feed-forward
    block; "post", behind each of them, before its result joins the residual; or both."""

    hidden: int
    vocab: int
    layers: tuple[LayerSpec, ...]
    positions: Positions
    norm: RmsNorm
    norm_placement: NormPlacement
    tied: bool  # the head's weight is the embedding
    embedding_scale: float | None = None  # of the embedded tokens
    logit_soft_cap: float | None = None  # logits become ``logit_soft_cap * tanh(logits / logit_soft_cap)``
    other_positions: tuple[Positions, ...] = ()  # of layers whose `GroupedQuery.rotary` names them
    scores: ScoreHead | None = None  # what it ends in instead of a language model head
    headless: bool = False  # it ends in its last norm: what is wanted of it are its hidden states

    @property
    def generates(self) -> bool:
        """It ends in logits."""
        return self.scores is None and not self.headless

    @property
    def norms_results(self) -> bool:
        """Whether norms stand behind the blocks of a layer."""
        return self.norm_placement != "pre"

    @property
    def rotated(self) -> int:
        """Cosines and sines of one token: of each kind of positions as many as a head has rotated elements."""
        return sum(kind.dim for kind in (self.positions, *self.other_positions))

    @property
    def attention(self) -> tuple[Attention, ...]:
        """Of each layer."""
        return tuple(layer.attention for layer in self.layers)
