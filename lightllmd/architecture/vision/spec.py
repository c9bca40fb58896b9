"""A vision model as data: what its family makes of a config, and what everything else reads.

A new kind of tower or connector is a class of its own beside these, added to the union below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from lightllmd.architecture.vision.layout import Geometry, ImageLayout
from lightllmd.architecture.vision.pixels import PixelNorm
from lightllmd.architecture.vision.placeholder import Placeholder
from lightllmd.architecture.weights import WeightSpec

Names = Mapping[str, str]  # a checkpoint's name of each tensor behind the prefix, by what it is; {layer}: a number
TowerActivation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu"]


@dataclass(frozen=True)
class VitSpec:
    """A vision transformer over squares of `image` pixels a side (Dosovitskiy et al. 2020), norms before its blocks,
    learnt positions: CLIP, SigLIP, InternViT."""

    hidden: int
    intermediate: int
    heads: int
    layers: int  # that are computed: those behind the last one that is read are not there
    image: int  # pixels a side
    patch: int  # pixels a side
    activation: TowerActivation
    norm: Literal["layer", "rms"]
    norm_eps: float
    names: Names
    # Which hidden states are its features, side by side: 0 are the embeddings, n what layer n makes of them.
    features: tuple[int, ...]
    class_token: bool = True  # before the patches, with a position of its own
    drops_first: bool = True  # the first token is no part of the features
    patch_bias: bool = False
    pre_norm: bool = False  # of the embeddings
    post_norm: bool = False  # of the last layer's hidden states
    qkv_bias: bool = True
    qk_norm: bool = False  # RMS norms over all heads of the queries and of the keys
    qk_norm_eps: float = 1e-6
    fused_qkv: bool = False  # one tensor in the checkpoint
    layer_scale: bool = False  # factors of what each block adds
    leading: int = 0  # dimensions of 1 that class token and positions are stored with

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.hidden // self.heads

    @property
    def side(self) -> int:
        """Patches a side."""
        return self.image // self.patch

    @property
    def positions(self) -> int:
        """Tokens of a square inside the tower."""
        return self.side**2 + self.class_token

    @property
    def tokens(self) -> int:
        """Features of a square."""
        return self.positions - self.drops_first

    @property
    def width(self) -> int:
        """Elements of a feature."""
        return self.hidden * len(self.features)


@dataclass(frozen=True)
class MlpConnector:
    """``linear_2(activation(linear_1(norm(features))))``. With `shuffle` n, n x n adjacent features become one that
    is n x n times as wide, before all else."""

    inputs: int  # elements of what the first linear reads
    inner: int
    outputs: int
    activation: TowerActivation
    names: Names
    bias: bool = True
    norm: bool = False  # a layer norm
    norm_eps: float = 1e-5
    shuffle: int = 1
    newline: bool = False  # a learnt embedding ends each row of an image


@dataclass(frozen=True)
class GridVitSpec:
    """A vision transformer over all patches of an image, with rotary positions in rows and columns (Wang et al. 2024,
    "Qwen2-VL"): half of a head's frequencies turn by the row, half by the column.

    The patches of `merge` x `merge` adjacent ones follow each other, since they become one token.
    """

    hidden: int
    intermediate: int
    heads: int
    layers: int
    patch: int  # pixels a side
    frames: int  # that a patch spans; an image's are all the same
    merge: int  # patches a side that become one token together
    activation: TowerActivation
    norm: Literal["layer", "rms"]
    gated: bool  # its feed-forward blocks, else they are two linears
    names: Names
    patch_bias: bool = False
    # Side of the squares of tokens that attention stays in, but for the layers `whole` (Bai et al. 2025,
    # "Qwen2.5-VL"); None: all layers attend to the whole image.
    window: int | None = None
    whole: frozenset[int] = frozenset()
    # Side of the square of learnt positions that is stretched over each image, and added to the patches (Qwen3-VL).
    table: int | None = None
    # Layers whose hidden states are features too, which are added behind the first decoder layers (Meng et al. 2024,
    # "DeepStack").
    taps: tuple[int, ...] = ()
    norm_eps: float = 1e-6
    rope_base: float = 10000.0

    @property
    def head_dim(self) -> int:
        """Elements of a head, a multiple of 4."""
        return self.hidden // self.heads

    @property
    def patches(self) -> int:
        """Of a token."""
        return self.merge**2


@dataclass(frozen=True)
class MergerSpec:
    """``fc2(gelu(fc1(norm(patches))))``: the patches of a token side by side become its embedding. There is one for the
    last hidden states and one for each tap of the tower; those normalise a token's patches together."""

    hidden: int  # elements of a patch
    merge: int
    outputs: int
    norm: Literal["layer", "rms"]
    taps: int
    names: Names
    norm_eps: float = 1e-6

    @property
    def inner(self) -> int:
        """Elements of a token's patches side by side."""
        return self.hidden * self.merge**2


@dataclass(frozen=True)
class PoolConnector:
    """``norm(mean of block x block adjacent features) @ projection``, with an RMS norm whose weight is stored less 1
    (Gemma Team 2025, "Gemma 3")."""

    inputs: int  # elements of a feature
    outputs: int
    side: int  # features a side
    block: int  # of them a side of what becomes one; what is left over at the end is not read
    norm_eps: float
    names: Names


Tower = VitSpec | GridVitSpec
Connector = MlpConnector | MergerSpec | PoolConnector


@dataclass(frozen=True)
class VisionSpec:
    """`out_hidden`: elements of an image embedding, the decoder's hidden size."""

    tower: Tower
    connector: Connector
    out_hidden: int
    geometry: Geometry
    placeholder: Placeholder
    norm: PixelNorm  # of the pixels, on the device
    weights: tuple[WeightSpec, ...]  # of tower and connector, in the order in which they are loaded
    deepstack: int = 0  # extra layers of features, which are added behind the first decoder layers
    bidirectional: bool = False  # tokens of an image attend to all of its tokens
    positions: Literal["plain", "grid"] = "plain"  # grid: rotary positions in three dimensions

    @cached_property
    def parameters(self) -> int:
        """Elements of all weights."""
        return sum(weight.elements for weight in self.weights)

    def patches(self, layout: ImageLayout) -> int:
        """Rows of the tower that an image of this layout is."""
        tower = self.tower
        return layout.tokens * tower.patches if isinstance(tower, GridVitSpec) else layout.tiles * tower.positions

    def embedding_bytes(self, tokens: int, item: int) -> int:
        """Of one image with so many tokens, in elements of `item` bytes."""
        return (1 + self.deepstack) * tokens * self.out_hidden * item
