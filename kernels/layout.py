"""What a step looks like to the operations: where its tokens lie, and where their keys and values are.

T tokens packed from all rows of a step; H query and K key/value heads of D elements; slots are those of `kv_cache`.
A `Batch` has what the operations of every device read, and metadata for the attention of one: made by that device's
runner, carried through the decoder unread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

Slots = Tensor | slice  # slots of the cache: their numbers, or a run of them
Metadata = TypeVar("Metadata")


@dataclass
class ImageRows:
    """What takes the place of the embeddings of N tokens of a step, and is added behind the decoder's first layers."""

    places: Tensor  # [N] int64 among the step's tokens
    values: Tensor  # [1 + deepstack, N, hidden]


@dataclass
class Batch(Generic[Metadata]):
    """The packed tokens of a step. Integers are int64 on a CPU, int32 where Triton's kernels read them."""

    tokens: Tensor  # [T] ids; on a GPU -1 stands for the newest token of its row, ``metadata.last[row]``
    rows: Tensor  # [T], each token's table row
    positions: Tensor  # [T], in its sequence
    slots: Tensor  # [T], where its keys and values go
    metadata: Metadata  # what the device's attention needs to know of the rows: `GatheredRows` or `TableRows`
    images: ImageRows | None = None  # None: all tokens are embedded by their ids


@dataclass(frozen=True)
class Heads:
    """The shape of attention. `query` is a multiple of `kv`."""

    query: int
    kv: int
    dim: int
    scale: float
    norm_eps: float  # of the norm over each query and key head, where a model has one
    window: int | None = None  # tokens that one sees, itself and those right before it; None: all before it
    soft_cap: float | None = None  # scores s become cap * tanh(s / cap)
    rotary: int = 0  # which kind of positions a batch has the angles of, where a model has several
    norm_offset: float = 0.0  # what is added to the weights of the norm over heads


# --- rows are gathered in groups: what torch's own attention reads -----------------------------------------------


@dataclass
class DecodeGroup:
    """B rows that feed one token each, read together because their lengths are alike."""

    tokens: Tensor | None  # [B], which of the packed tokens; None: all of them, in order
    slots: Slots  # [B * L]: each row's slots, padded to L with its own first one; a run only where B is 1
    mask: Tensor | None  # [B, 1, 1, L], 0 or -inf; None where every row has length L


@dataclass
class PrefillRow:
    """One row that feeds `count` tokens, packed from `first` on, behind `start` cached ones."""

    first: int
    count: int
    start: int
    slots: Slots  # [start + count]
    # Runs of its tokens, from first to behind the last one in the sequence: each token of one sees up to its end.
    bidirectional: Sequence[tuple[int, int]] = ()


@dataclass
class GatheredRows:
    """Metadata of torch's own attention: what is gathered from the cache, and each token's rotation."""

    cos: Tensor | None  # [T, kinds, D], see `Heads.rotary`; None: the model has its positions elsewhere
    sin: Tensor | None  # [T, kinds, D], the first half negated
    decode: list[DecodeGroup]
    prefill: list[PrefillRow]


# --- rows are read through the request->slot table: what kernels of a GPU read ------------------------------------


@dataclass(frozen=True)
class Span:
    """`rows` rows of `count` tokens each, fed whole, packed from `first` on, computed as rows of `padded` tokens."""

    first: int
    rows: int
    count: int
    padded: int


@dataclass
class PrefillTiles:
    """The rows that feed tokens named by the scheduler, packed behind the decode rows. Tensors are int32 on the device.

    Row r feeds ``counts[r]`` tokens, packed from ``first[r]`` on, behind ``starts[r]`` cached ones.
    """

    tiles: Tensor  # [N, 2]: (row, block of its queries), the heaviest first
    number: Tensor  # [1] of the tiles; those behind are padding
    rows: Tensor  # [R] table rows
    first: Tensor  # [R], counted from the first token behind the decode rows
    counts: Tensor  # [R]
    starts: Tensor  # [R]
    pairs: int  # (query, head of a group) pairs of a tile
    segments: int  # of the keys of each tile; 1: tiles are not split
    whole: list[Span]  # the rows that have no tiles
    # [T - decode], how many tokens of its row each one behind the decode rows sees where no window hides some: up to
    # itself, or up to the end of the run that it is in. None: there is no such run.
    bidirectional: Tensor | None = None


@dataclass
class TableRows:
    """Metadata of attention kernels that find a row's slots in the request->slot table.

    The first `decode` of the T tokens are those of rows that feed one token each, then come the others. Lengths are on
    the device only, so a step with as many decode rows and nothing else is the same launches: a graph.
    """

    decode: int
    prefill: PrefillTiles | None
    angles: Tensor  # [T] int32, each token's row of cos_sin
    cos_sin: Tensor  # [P, kinds D] fp32, see `Heads.rotary`: cosines, then sines, of half a head each
    table: Tensor  # [R, W] int32, request->slot
    last: Tensor  # [R] int32, the newest token of each table row
