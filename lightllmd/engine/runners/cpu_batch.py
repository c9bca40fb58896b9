"""The request->slot table in host memory, and how rows become the tensors that torch's own attention reads."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightllmd.config.bounds import GATHER_PADDING, SHORT_ROW
from lightllmd.engine.step import Row
from lightllmd.kernels.layout import Batch, DecodeGroup, GatheredRows, PrefillRow, Slots
from lightllmd.models.rope import Rope

# Decode rows are read together while the shortest has at least this share of the longest's length: padding costs
# reads, a further group costs calls. Rows up to SHORT_ROW tokens are never parted.
ALIKE = 1 / GATHER_PADDING


class SlotTable:
    """``[rows, width]``: the slot of each token of each table row. Lives in host memory; entries at or beyond a
    row's length are stale. `total`: the slots that there are; rows may share some."""

    def __init__(self, rows: int, width: int, total: int, device: torch.device, dtype: torch.dtype) -> None:
        self.slots = torch.zeros((rows, width), dtype=torch.int32)
        self._run = [-1] * rows  # the first slot of a row whose slots are one run, else -1
        self._most_gathered = GATHER_PADDING * total
        self._device, self._dtype = device, dtype

    def pack(self, rows: list[Row], rope: Rope | None) -> Batch[GatheredRows]:
        """Enters the rows' slots into the table and lays their tokens out, in the order of the rows. A row without
        tokens, a sibling, is entered only."""
        for row in rows:
            if row.past:
                self._enter(row.table_row, 0, row.past)
            if row.slots:
                self._enter(row.table_row, row.start, row.slots)
        tokens = [token for row in rows for token in row.tokens]
        starts, first = [], 0  # of each row among the packed tokens
        for row in rows:
            starts.append(first)
            first += len(row.tokens)
        single = [index for index, row in enumerate(rows) if len(row.tokens) == 1]
        prefill = [
            PrefillRow(
                starts[index],
                len(row.tokens),
                row.start,
                self._row_slots(row),
                [(row.start + begin, row.start + begin + tokens) for begin, tokens in row.bidirectional or ()],
            )
            for index, row in enumerate(rows)
            if len(row.tokens) > 1
        ]
        positions = self._to_device([at for row in rows for at in range(row.start, row.start + len(row.tokens))])
        decode = self._groups([rows[index] for index in single], [starts[index] for index in single], len(tokens))
        return Batch(
            tokens=self._to_device(tokens),
            rows=self._to_device([row.table_row for row in rows for _ in row.tokens]),
            positions=positions,
            slots=self._to_device([slot for row in rows for slot in row.slots]),
            metadata=GatheredRows(*self._rotations(rows, rope, positions), decode, prefill),
        )

    def _rotations(
        self, rows: list[Row], rope: Rope | None, positions: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if rope is None:
            return None, None
        lengths = [length for row in rows for length in rope_lengths(row)] if rope.by_length else None
        if rope.in_grids and any(row.positions is not None or row.shift for row in rows):
            positions = torch.from_numpy(np.concatenate([grid_positions(row) for row in rows], 1)).to(self._device)
        angles = rope.cos_sin(positions, None if lengths is None else self._to_device(lengths))
        cos, sin = angles.view(len(angles), -1, 2, rope.pairs).unbind(2)
        return torch.cat([cos, cos], -1).to(self._dtype), torch.cat([-sin, sin], -1).to(self._dtype)

    def _enter(self, table_row: int, first: int, slots: list[int]) -> None:
        """`slots` are the row's from token `first` on, and those before it are in the table."""
        if len(slots) == 1:
            self.slots[table_row, first] = slots[0]
        else:
            self.slots[table_row, first : first + len(slots)] = torch.tensor(slots, dtype=torch.int32)
        run = slots[0] if first == 0 else self._run[table_row]
        contiguous = run >= 0 and slots[0] == run + first and _ascending(slots)
        self._run[table_row] = run if contiguous else -1

    def _row_slots(self, row: Row) -> Slots:
        end = row.start + len(row.tokens)
        run = self._run[row.table_row]
        return slice(run, run + end) if run >= 0 else self.slots[row.table_row, :end].to(self._device)

    def _groups(self, rows: list[Row], starts: list[int], total: int) -> list[DecodeGroup]:
        """Rows of like length together, longest first; no more at a time than would hold every slot if none was
        shared."""
        order = sorted(range(len(rows)), key=lambda index: -rows[index].start)
        groups: list[list[int]] = []
        for index in order:
            longest = rows[groups[-1][0]].start + 1 if groups else 0
            alike = rows[index].start + 1 >= ALIKE * longest
            fits = groups and (len(groups[-1]) + 1) * longest <= self._most_gathered
            if groups and (longest <= SHORT_ROW or (alike and fits)):
                groups[-1].append(index)
            else:
                groups.append([index])
        out = []
        for group in groups:
            members = sorted(group)
            whole = len(members) == total
            tokens = None if whole else self._to_device([starts[index] for index in members])
            out.append(self._group([rows[index] for index in members], tokens))
        return out

    def _group(self, rows: list[Row], tokens: Tensor | None) -> DecodeGroup:
        if len(rows) == 1:
            return DecodeGroup(tokens, self._row_slots(rows[0]), None)
        lengths = torch.tensor([row.start + 1 for row in rows])
        longest = int(lengths.max())
        slots = self.slots[[row.table_row for row in rows], :longest]
        beyond = torch.arange(longest) >= lengths[:, None]
        if not bool(beyond.any()):
            return DecodeGroup(tokens, slots.flatten().to(self._device), None)
        slots = torch.where(beyond, slots[:, :1], slots)
        mask = torch.zeros(beyond.shape, dtype=self._dtype).masked_fill_(beyond, float("-inf"))
        return DecodeGroup(tokens, slots.flatten().to(self._device), mask[:, None, None].to(self._device))

    def _to_device(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self._device)


def _ascending(slots: list[int]) -> bool:
    return slots[-1] - slots[0] == len(slots) - 1 and slots == list(range(slots[0], slots[0] + len(slots)))


def rope_lengths(row: Row) -> list[int]:
    """See `Rope.cos_sin`: the whole prompt for its tokens, position + 1 for generated ones."""
    end = row.start + len(row.tokens)
    prompt = row.prompt_length or end - row.position
    return [max(prompt, position + 1) for position in range(row.start, end)]


def grid_positions(row: Row) -> NDArray[np.int32]:
    """``[3, len(row.tokens)]``: frame, row and column of each fed token, see `Row.positions`."""
    if row.positions is not None:
        return np.frombuffer(row.positions, "<i4").reshape(3, -1)
    first = row.start + row.shift
    return np.broadcast_to(np.arange(first, first + len(row.tokens), dtype=np.int32), (3, len(row.tokens)))
