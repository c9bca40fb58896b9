"""How a step becomes the tensors that the kernels of a GPU read: its numbers, laid out in one upload.

A padded step has the same layout, and so the same tensors, whatever its rows are: a graph of its launches can be
replayed. Padding belongs to a table row and a slot that nobody owns.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightllmd.config.bounds import FEW_ROWS, NAMED_ROWS
from lightllmd.engine.batch import DecodeRows, Step
from lightllmd.engine.staging import Numbers, Upload
from lightllmd.engine.table import rope_lengths
from lightllmd.kernels.layout import PrefillTiles, TableBatch
from lightllmd.kernels.prefill_attention import pairs_per_tile, tiles_for
from lightllmd.kernels.whole_prompts import spans
from lightllmd.models.layers import Rope


@dataclass
class Packed:
    """A step on the device, valid until the next one is packed. What is sampled is padded to a batch size."""

    batch: TableBatch
    sampled: Tensor | None  # [R] int32, the tokens whose next token is asked for; None: those of all rows, in order
    table_rows: Tensor  # [R] int32, whose they are
    generated: Tensor  # [R] int32, positions of the tokens to come


class Packer:
    """`table` ``[rows + 1, width]`` and `last` ``[rows + 1]`` are the runner's; their last row is padding's."""

    def __init__(self, table: Tensor, last: Tensor, pad_slot: int, rope: Rope, group: int, tokens: int) -> None:
        """`group`: query heads of a key/value head. `tokens`: the most that a step feeds."""
        device, (rows, width) = table.device, table.shape
        self._table, self._last = table, last
        self._pad_row, self._pad_slot = rows - 1, pad_slot
        self._rope, self._group = rope, group
        self.longest_whole = 0  # the longest row that `whole_prompts` has planned for
        # Of a token: id, table row, position, slot, length; of a row: three of what is sampled, four of its tiles.
        most = rows + NAMED_ROWS + 1
        self._upload = Upload(5 * tokens + 7 * most + 2 * (tokens * group // 64 + most), device)
        self._newest = torch.full((max(rows, FEW_ROWS),), -1, dtype=torch.int32, device=device)
        self._counting = torch.arange(tokens, dtype=torch.int32, device=device)
        # The angles of all positions or, where they depend on lengths too, of the step's tokens.
        places = torch.arange(1 if rope.by_length else width, device=device)
        self._cos_sin = rope.cos_sin(places, places if rope.by_length else None)
        if rope.by_length:
            self._cos_sin = self._cos_sin.repeat(tokens, 1)

    def going_on(self, rows: DecodeRows, size: int) -> Packed:
        """Rows that feed their newest tokens, padded to `size`."""
        pad = size - len(rows.table_rows)
        self._upload.begin()
        self._upload.put(rows.table_rows + [self._pad_row] * pad)
        self._upload.put(rows.starts + [0] * pad)
        self._upload.put(rows.slots + [self._pad_slot] * pad)
        self._upload.put(rows.positions + [0] * pad)
        table_rows, positions, slots, generated = self._upload.send()
        lengths = positions + 1 if self._rope.by_length else None
        batch = self._batch(self._newest[:size], table_rows, positions, slots, lengths, size, None)
        return Packed(batch, None, table_rows, generated)

    def named(self, step: Step, sampled_size: int, size: int | None = None) -> Packed:
        """A step that has rows with named tokens, behind those that go on. With a `size` it is padded to so many
        tokens; then nobody may go on, and fewer than `named_rows(size)` rows be there."""
        decode, rows = step.decode, step.rows
        ahead = len(decode.table_rows)
        counts, starts = [len(row.tokens) for row in rows], [row.start for row in rows]
        ends = [ahead + int(end) for end in np.cumsum(counts)]
        sampled = [(end - 1, row) for end, row in zip(ends, rows, strict=True) if row.sample]
        pad = sampled_size - ahead - len(sampled)
        tokens = size or step.fed
        pairs = pairs_per_tile(tokens, self._group)
        whole = spans(counts, starts, ahead, self.longest_whole)
        apart = {index + number for index, span in whole.items() for number in range(span.rows)}
        tiled = [0 if index in apart else count for index, count in enumerate(counts)]
        tiles = tiles_for(tiled, starts, self._group, pairs)
        spare = 0 if size is None else size - step.fed
        self._upload.begin()
        self._put(np.concatenate([_ints([-1] * ahead), *(_ints(row.tokens) for row in rows)]), 0, spare)
        repeated = np.repeat(_ints([row.table_row for row in rows]), counts)
        self._put(np.concatenate([_ints(decode.table_rows), repeated]), self._pad_row, spare)
        places = (np.arange(row.start, row.start + len(row.tokens), dtype=np.int32) for row in rows)
        self._put(np.concatenate([_ints(decode.starts), *places]), 0, spare)
        self._put(np.concatenate([_ints(decode.slots), *(_ints(row.slots) for row in rows)]), self._pad_slot, spare)
        if self._rope.by_length:
            self._put([start + 1 for start in decode.starts] + list(chain(*map(rope_lengths, rows))), 1, spare)
        # A row of padding feeds nothing, so its tiles are passed over.
        rows_there = len(rows) if size is None else named_rows(size)
        missing = rows_there - len(rows)
        tiles_there = len(tiles) if size is None else size * self._group // pairs + rows_there
        filler = np.tile(np.array([rows_there - 1, 0]), tiles_there - len(tiles))
        self._upload.put(np.concatenate([tiles.reshape(-1), filler]))
        self._put([row.table_row for row in rows], self._pad_row, missing)
        self._put([ahead, *ends[:-1]], 0, missing)
        self._put(counts, 0, missing)
        self._put(starts, 0, missing)
        self._put([*range(ahead), *(at for at, _ in sampled)], 0, pad)
        self._put(decode.table_rows + [row.table_row for _, row in sampled], self._pad_row, pad)
        self._put(decode.positions + [row.position for _, row in sampled], 0, pad)
        *fed, flat, tile_rows, first, count, start, at, table_rows, generated = self._upload.send()
        prefill = PrefillTiles(flat.view(-1, 2), pairs, tile_rows, first, count, start, list(whole.values()))
        batch = self._batch(*fed[:4], fed[4] if self._rope.by_length else None, ahead, prefill)
        return Packed(batch, at, table_rows, generated)

    def _put(self, numbers: Numbers, filler: int, count: int) -> None:
        self._upload.put(numbers if not count else np.concatenate([_ints(numbers), _ints([filler] * count)]))

    def _batch(
        self,
        tokens: Tensor,
        table_rows: Tensor,
        positions: Tensor,
        slots: Tensor,
        lengths: Tensor | None,
        decode: int,
        prefill: PrefillTiles | None,
    ) -> TableBatch:
        angles = positions
        if lengths is not None:
            angles = self._counting[: len(positions)]
            self._cos_sin[: len(positions)] = self._rope.cos_sin(positions, lengths)
        return TableBatch(
            tokens=tokens,
            rows=table_rows,
            positions=positions,
            slots=slots,
            decode=decode,
            prefill=prefill,
            angles=angles,
            cos_sin=self._cos_sin,
            table=self._table,
            last=self._last,
        )


def _ints(numbers: Numbers) -> NDArray[np.int32]:
    return np.asarray(numbers, np.int32)


def named_rows(size: int) -> int:
    """The rows that a step of `size` padded tokens has, the last of them always padding."""
    return min(size, NAMED_ROWS) + 1
