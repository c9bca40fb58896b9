"""How a step becomes the tensors that the kernels of a GPU read: its numbers, laid out in one upload.

A padded step has the same layout, and so the same tensors, whatever its rows are: a graph of its launches can be
replayed. Padding belongs to a table row and a slot that no sequence owns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightllmd.config.bounds import FEW_ROWS, PREFILL_ROWS
from lightllmd.engine.runners.cpu_batch import grid_positions, rope_lengths
from lightllmd.engine.runners.image_rows import image_rows
from lightllmd.engine.runners.step_shapes import StepShape, first_tokens
from lightllmd.engine.runners.transfers import Numbers, Upload, pinned, send
from lightllmd.engine.step import DecodeRows, Row, Step
from lightllmd.kernels import split_prefill
from lightllmd.kernels.layout import Batch, Heads, PrefillTiles, TableRows
from lightllmd.kernels.prefill_attention import pairs_per_tile, tiles_for
from lightllmd.kernels.whole_prompts import spans
from lightllmd.models.embeddings import owners_of
from lightllmd.models.rope import NoRope, Rope


@dataclass
class Packed:
    """A step on the device, valid until the next one is packed. What is sampled is padded to a batch size."""

    shape: StepShape
    batch: Batch[TableRows]
    sampled: Tensor | None  # [R] int32, the tokens whose next token is asked for; None: those of all rows, in order
    table_rows: Tensor  # [R] int32, whose they are
    generated: Tensor  # [R] int32, positions of the tokens to come
    targets: Tensor | None = None  # [N] int32, row by row; None: no row has `Row.targets`, or all are empty
    before: Tensor | None = None  # [N] int32, the fed token before each target
    pooled: Tensor | None = None  # [P] int32, the fed tokens that become vectors, row by row; None: there are none
    owners: Tensor | None = None  # [P] int32, the vector that each of those is, or is a part of
    owned: list[int] = field(default_factory=list)  # the same on the host

    @property
    def whole(self) -> bool:
        """The hidden states of all tokens are asked for: by a graph, which has no others, for targets or vectors."""
        return self.shape.padded or self.targets is not None or self.pooled is not None

    @property
    def causal(self) -> bool:
        """No token sees later ones: what graphs are captured for."""
        prefill = self.batch.metadata.prefill
        return prefill is None or prefill.bidirectional is None


class Packer:
    """`table` ``[rows + 1, width]`` and `last` ``[rows + 1]`` are the runner's; their last row is padding's."""

    def __init__(
        self,
        table: Tensor,
        last: Tensor,
        pad_slot: int,
        rope: Rope | None,
        heads: Heads,
        tokens: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`tokens`: the most that a step feeds. Without `rope` heads are turned by no angle. `dtype`: of embeddings of
        images."""
        device, (rows, width) = table.device, table.shape
        self._table, self._last, self._dtype = table, last, dtype
        self._pad_row, self._pad_slot = rows - 1, pad_slot
        group = heads.query // heads.kv
        self._rope = rope if rope is not None else NoRope(heads.dim)
        self._group, self._kv_heads = group, heads.kv
        self.longest_whole = 0  # the longest row that `whole_prompts` has planned for
        # Of a token: id, table row, position, slot, length or angles, and target with the place before it or a vector's
        # place with its number, and its three positions in an image; of a row: three of what is
        # sampled, four of its tiles; of a step: how many tiles it has.
        most = rows + PREFILL_ROWS + 1
        self._upload = Upload(
            (10 if self._rope.in_grids else 7) * tokens + 7 * most + 2 * (tokens * group // 64 + most) + 1, device
        )
        self._newest = np.full(max(rows, FEW_ROWS), -1, np.int32)
        self._counting = torch.arange(tokens, dtype=torch.int32, device=device)
        # The angles of all positions or, where they depend on lengths too, of the step's tokens.
        angles = torch.arange(1 if self._rope.by_length else width, device=device)
        self._cos_sin = self._rope.cos_sin(angles, angles if self._rope.by_length else None)
        if self._rope.by_length:
            self._cos_sin = self._cos_sin.repeat(tokens, 1)
        self._width = width
        if self._rope.in_grids:  # behind those of all positions the angles of the step's tokens of images
            self._cos_sin = torch.cat([self._cos_sin, self._cos_sin[:1].expand(tokens, -1)])
        self._shifts = np.zeros(rows, np.int32)  # of each table row, see `Row.shift`

    def pack(self, step: Step, shape: StepShape, sampled: int) -> Packed:
        """A step that fits `shape`; what is sampled of it is padded to so many."""
        self._take_over(step.rows)
        self._upload.begin()
        if step.rows or shape.prefill_tokens:
            return self._named(step, shape, sampled)
        return self._decode_only(step.decode, shape)

    def _take_over(self, rows: list[Row]) -> None:
        """The slots of tokens that are in the cache join the table, behind all that read it before. torch does not
        give the pinned buffer away before the copies are done."""
        if self._rope.in_grids:
            for row in rows:
                self._shifts[row.table_row] = row.shift
        entering = [row for row in rows if row.past]
        if not entering:
            return
        slots = pinned(np.concatenate([_ints(row.past or ()) for row in entering]), self._table.device)
        for row, past in zip(entering, slots.split([len(row.past or ()) for row in entering]), strict=True):
            self._table[row.table_row, : len(past)].copy_(past, non_blocking=True)

    def _decode_only(self, rows: DecodeRows, shape: StepShape) -> Packed:
        """Rows that feed their newest tokens."""
        size = shape.decode_tokens
        pad = size - len(rows.table_rows)
        self._upload.put(self._newest[:size])
        self._upload.put(rows.table_rows + [self._pad_row] * pad)
        self._upload.put(rows.starts + [0] * pad)
        self._upload.put(rows.slots + [self._pad_slot] * pad)
        if self._rope.by_length:
            self._upload.put([start + 1 for start in rows.starts] + [1] * pad)
        if self._rope.in_grids:
            self._upload.put(np.concatenate([self._shifted(rows), np.zeros(pad, np.int32)]))
        self._upload.put(rows.positions + [0] * pad)
        *fed, generated = self._upload.send()
        return Packed(shape, self._batch(fed, size, None), None, fed[1], generated)

    def _named(self, step: Step, shape: StepShape, sampled: int) -> Packed:
        """A step that has rows with named tokens."""
        decode, rows = step.decode, step.rows
        firsts = first_tokens(step, shape)
        fed = [(row, first) for row, first in zip(rows, firsts, strict=True) if row.tokens]
        single = [row for row, first in fed if first < shape.decode_tokens]
        longer = [row for row, first in fed if first >= shape.decode_tokens]
        counts, starts = [len(row.tokens) for row in longer], [row.start for row in longer]
        spare = shape.decode_tokens - len(decode.table_rows) - len(single), shape.prefill_tokens - sum(counts)

        def put(ahead: list[int], behind: Iterable[Numbers], filler: int) -> None:
            """A number of each token, padding included."""
            self._put([ahead, [filler] * spare[0], *behind, [filler] * spare[1]])

        put(
            [-1] * len(decode.table_rows) + [row.tokens[0] for row in single],
            (row.tokens for row in longer),
            0,
        )
        put(
            decode.table_rows + [row.table_row for row in single],
            [np.repeat(_ints([row.table_row for row in longer]), _ints(counts))],
            self._pad_row,
        )
        put(
            decode.starts + [row.start for row in single],
            (np.arange(row.start, row.start + len(row.tokens)) for row in longer),
            0,
        )
        put(decode.slots + [row.slots[0] for row in single], (row.slots for row in longer), self._pad_slot)
        if self._rope.by_length:
            put(
                [start + 1 for start in decode.starts] + [rope_lengths(row)[0] for row in single],
                (rope_lengths(row) for row in longer),
                1,
            )
        of_images: list[NDArray[np.int32]] = []
        if self._rope.in_grids:
            angles = self._angles([*single, *longer], of_images)
            self._put(
                [
                    self._shifted(decode),
                    *angles[: len(single)],
                    [0] * spare[0],
                    *angles[len(single) :],
                    [0] * spare[1],
                ]
            )
        pairs, segments = pairs_per_tile(shape.prefill_tokens, self._group), 1
        if shape.padded and shape.decode_tokens and shape.prefill_tokens:
            segments = split_prefill.segments_for(
                shape.prefill_tokens, self._group, self._kv_heads, self._table.shape[1]
            )
            pairs = pairs if segments == 1 else split_prefill.PAIRS
        causal = [not row.bidirectional for row in longer]
        whole = {} if shape.padded else spans(counts, starts, shape.decode_tokens, self.longest_whole, causal)
        if shape.prefill_tokens:
            apart = {index + number for index, span in whole.items() for number in range(span.rows)}
            tiles = tiles_for(
                [0 if index in apart else count for index, count in enumerate(counts)], starts, self._group, pairs
            )
            self._put_tiles(longer, counts, starts, tiles, shape, pairs)
        self._put_sampled(step, firsts, sampled)
        scored = [(row, first) for row, first in zip(rows, firsts, strict=True) if row.targets]
        if scored:
            self._put([row.targets or () for row, _ in scored])
            self._put([np.arange(first, first + len(row.targets or ())) for row, first in scored])
        pooled = [(row.pooling, first) for row, first in zip(rows, firsts, strict=True) if row.pooling is not None]
        pooled = [(pooling, first) for pooling, first in pooled if pooling.at]
        owned: list[int] = []
        if pooled:
            self._put([_ints(pooling.at) + first for pooling, first in pooled])
            owned = owners_of([(len(pooling.at), pooling.summed) for pooling, _ in pooled])
            self._put([owned])
        if of_images:
            self._put([np.concatenate(of_images, 1).reshape(-1)])
        sent = iter(self._upload.send())
        tokens = [next(sent) for _ in range(5 if self._rope.by_length or self._rope.in_grids else 4)]
        prefill = None
        if shape.prefill_tokens:
            flat, *others = (next(sent) for _ in range(6))
            prefill = PrefillTiles(flat.view(-1, 2), *others, pairs, segments, whole=list(whole.values()))
            if not all(causal):
                prefill.bidirectional = send(_ends(longer, shape.prefill_tokens), self._upload.device.device)
        batch = self._batch(tokens, shape.decode_tokens, prefill)
        packed = Packed(shape, batch, next(sent), next(sent), next(sent))
        if scored:
            packed.targets, packed.before = next(sent), next(sent)
        packed.batch.images = image_rows(rows, firsts, self._dtype, self._table.device)
        if pooled:
            packed.pooled, packed.owners, packed.owned = next(sent), next(sent), owned
        if of_images:
            positions = next(sent).view(3, -1)
            self._cos_sin[self._width : self._width + positions.shape[1]] = self._rope.cos_sin(positions)
        return packed

    def _shifted(self, rows: DecodeRows) -> NDArray[np.int32]:
        """The rotary positions of the tokens that decode rows feed: those of text, so rows of `_cos_sin`."""
        return _ints(rows.starts) + self._shifts[rows.table_rows]

    def _angles(self, rows: list[Row], of_images: list[NDArray[np.int32]]) -> list[NDArray[np.int32]]:
        """The rows of `_cos_sin` that the fed tokens of each row have: those of text are there, those whose three
        positions differ come behind them, from `of_images` [3, N], which such positions are added to."""
        found = []
        behind = self._width
        for row in rows:
            positions = grid_positions(row)
            angles = positions[0]
            if row.positions is not None and (apart := (positions != angles).any(0)).any():
                of_images.append(positions[:, apart])
                first, behind = behind, behind + of_images[-1].shape[1]
                angles = angles.copy()
                angles[apart] = np.arange(first, behind)
            found.append(angles)
        return found

    def _put_tiles(
        self,
        rows: list[Row],
        counts: list[int],
        starts: list[int],
        tiles: NDArray[np.int32],
        shape: StepShape,
        pairs: int,
    ) -> None:
        """A row of padding feeds nothing, so its tiles are passed over."""
        there = shape.prefill_rows if shape.padded else len(rows)
        most = shape.prefill_tokens * self._group // pairs + there if shape.padded else len(tiles)
        self._put([tiles.reshape(-1), np.tile(np.array([there - 1, 0]), most - len(tiles))])
        self._put([[len(tiles)]])
        firsts = np.cumsum([0, *counts])[:-1]
        missing = there - len(rows)
        self._put([[row.table_row for row in rows], [self._pad_row] * missing])
        for numbers in (firsts, counts, starts):
            self._put([numbers, [0] * missing])

    def _put_sampled(self, step: Step, firsts: list[int], size: int) -> None:
        """Which tokens are sampled, whose they are, and the positions of those to come. `firsts`: of each row."""
        decode, rows = step.decode, step.rows
        lasts: list[int] = []
        for row, first in zip(rows, firsts, strict=True):
            lasts.append(first + len(row.tokens) - 1 if row.sibling_of is None else lasts[row.sibling_of])
        asked = [(row, last) for row, last in zip(rows, lasts, strict=True) if row.sample]
        ahead = len(decode.table_rows)
        pad = size - ahead - len(asked)
        self._put([range(ahead), [last for _, last in asked], [0] * pad])
        self._put([decode.table_rows, [row.table_row for row, _ in asked], [self._pad_row] * pad])
        self._put([decode.positions, [row.position for row, _ in asked], [0] * pad])

    def _put(self, parts: Sequence[Numbers]) -> None:
        self._upload.put(np.concatenate([_ints(part) for part in parts]))

    def _batch(self, fed: list[Tensor], decode: int, prefill: PrefillTiles | None) -> Batch[TableRows]:
        """`fed`: of each token its id, table row, position, slot and, where angles depend on it, length."""
        tokens, table_rows, positions, slots, *apart = fed
        angles = apart[0] if self._rope.in_grids else positions
        if self._rope.by_length:
            angles = self._counting[: len(positions)]
            self._cos_sin[: len(positions)] = self._rope.cos_sin(positions, apart[0])
        metadata = TableRows(decode, prefill, angles, self._cos_sin, self._table, self._last)
        return Batch(tokens, table_rows, positions, slots, metadata)


def _ends(rows: list[Row], tokens: int) -> NDArray[np.int32]:
    """See `PrefillTiles.bidirectional`; of padding zeros."""
    found = np.zeros(tokens, np.int32)
    first = 0
    for row in rows:
        own = found[first : (first := first + len(row.tokens))]
        own[:] = np.arange(row.start + 1, row.start + 1 + len(row.tokens))
        for begin, count in row.bidirectional or ():
            own[begin : begin + count] = row.start + begin + count
    return found


def _ints(numbers: Numbers) -> NDArray[np.int32]:
    return np.asarray(numbers, np.int32)
