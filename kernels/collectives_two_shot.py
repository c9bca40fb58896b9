"""All-reduce of larger messages in Triton, and how parts of rows become whole ones on all ranks.

In two shots each rank sums the share of the message that is its own, out of what the others have stored into its
memory, and stores the result into theirs (reduce-scatter, then all-gather). All ranks have the same bits, since each
number is made on one of them.

No region is read and written at a time. Parts: a rank stores its next ones after its kernel has ended, which has seen
that all others had stored their results, made of what lay there. Results: they are stored behind the others' next
parts, which these send after their kernels have ended, the results being read. `gather` reads parts at its end, so it
waits until the others have read theirs, too.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightllmd.architecture.collectives_memory import BLOCK
from lightllmd.kernels.collectives_signals import await_flags, raise_flag

UNIT = 16  # shares and messages are whole multiples of so many elements, so that they are moved 16 bytes at a time
WARPS = 8


@dataclass(frozen=True, eq=False)
class ShareExchange:
    """Where a rank receives what others store in two shots. Regions are those of each rank, in its own memory."""

    parts: tuple[Tensor, ...]  # uint8
    results: tuple[Tensor, ...]  # uint8
    flags: tuple[Tensor, ...]  # int32 [2, programs, ranks]: by phase and by the rank that raises it
    calls: Tensor  # int32 [programs], this rank's: of each program the calls so far
    rank: int
    block: int = BLOCK  # elements that a program moves to each rank
    _typed: dict[torch.dtype, tuple[tuple[Tensor, ...], ...]] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self.parts)

    def blocks(self, item: int) -> int:
        """Blocks of elements of `item` bytes that a rank's share may have."""
        return min(len(self.calls), self.parts[0].numel() // (self.ranks * self.block * item))

    def regions(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], ...]:
        """Parts and results as elements of `dtype`. Kept: views cost the host as much as a launch."""
        if dtype not in self._typed:
            self._typed[dtype] = tuple(tuple(one.view(dtype) for one in each) for each in (self.parts, self.results))
        return self._typed[dtype]

    def room(self, item: int) -> int:
        """Elements of `item` bytes of the largest message."""
        return self.blocks(item) * self.block * self.ranks


@triton.jit(do_not_specialize=["units", "share_units"])
def _two_shot(
    x,
    residual,
    out,
    parts,
    results,
    flags,
    calls,
    units,
    share_units,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Program p: block p of the share of each rank. `units`: of the message ``x [UNIT * units]``; `share_units`: of
    each share but the last, which may be shorter."""
    program = tl.program_id(0)
    element = tl.arange(0, BLOCK)
    call = tl.load(calls + program) + 1
    begin = program * BLOCK
    inside = begin + element < share_units * UNIT
    sent = (RANK * BLOCKS + program).to(tl.int64) * BLOCK + element
    for step in tl.static_range(1, RANKS):
        at = (((RANK + step) % RANKS) * share_units).to(tl.int64) * UNIT + begin + element
        part = tl.load(x + at, mask=inside & (at < units.to(tl.int64) * UNIT), other=0.0)
        tl.store(parts[(RANK + step) % RANKS] + sent, part)
    for step in tl.static_range(1, RANKS):
        raise_flag(flags[(RANK + step) % RANKS] + program * RANKS + RANK, call)

    at = (RANK * share_units).to(tl.int64) * UNIT + begin + element
    mine = inside & (at < units.to(tl.int64) * UNIT)
    own = tl.load(x + at, mask=mine, other=0.0).to(tl.float32)
    if residual is not None:
        old = tl.load(residual + at, mask=mine, other=0.0).to(tl.float32)
    await_flags(flags[RANK] + program * RANKS, call, RANK, RANKS, WIDTH)
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            total += own
        else:
            # Past the first-level cache: another device wrote it.
            received = (rank * BLOCKS + program).to(tl.int64) * BLOCK + element
            total += tl.load(parts[RANK] + received, cache_modifier=".cg").to(tl.float32)
    if residual is not None:
        total += old
    made = total.to(out.dtype.element_ty)
    for step in tl.static_range(1, RANKS):
        tl.store(results[(RANK + step) % RANKS] + sent, made)
    for step in tl.static_range(1, RANKS):
        raise_flag(flags[(RANK + step) % RANKS] + (PROGRAMS + program) * RANKS + RANK, call)
    tl.store(out + at, made, mask=mine)

    await_flags(flags[RANK] + (PROGRAMS + program) * RANKS, call, RANK, RANKS, WIDTH)
    for step in tl.static_range(1, RANKS):
        result = tl.load(
            results[RANK] + (((RANK + step) % RANKS) * BLOCKS + program).to(tl.int64) * BLOCK + element,
            cache_modifier=".cg",
        )
        at = (((RANK + step) % RANKS) * share_units).to(tl.int64) * UNIT + begin + element
        tl.store(out + at, result, mask=inside & (at < units.to(tl.int64) * UNIT))
    tl.store(calls + program, call)


@triton.jit(do_not_specialize=["rows"])
def _gather(
    part,
    out,
    parts,
    flags,
    calls,
    rows,
    part_stride,
    out_stride,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program p: a block of the columns of a row of ``part [rows, WIDE]``, rows fastest; ``out [rows, COLUMNS]``."""
    program = tl.program_id(0)
    row, begin = (program % rows).to(tl.int64), program // rows * BLOCK
    element = tl.arange(0, BLOCK)
    column = begin + element
    call = tl.load(calls + program) + 1
    own = tl.load(part + row * part_stride + column, mask=column < WIDE, other=0.0)
    sent = (RANK * BLOCKS + program).to(tl.int64) * BLOCK + element
    for step in tl.static_range(1, RANKS):
        tl.store(parts[(RANK + step) % RANKS] + sent, own)
    for step in tl.static_range(1, RANKS):
        raise_flag(flags[(RANK + step) % RANKS] + program * RANKS + RANK, call)
    at = RANK * WIDE + column
    tl.store(out + row * out_stride + at, own, mask=(column < WIDE) & (at < COLUMNS))
    await_flags(flags[RANK] + program * RANKS, call, RANK, RANKS, WIDTH)
    for step in tl.static_range(1, RANKS):
        received = tl.load(
            parts[RANK] + (((RANK + step) % RANKS) * BLOCKS + program).to(tl.int64) * BLOCK + element,
            cache_modifier=".cg",
        )
        at = ((RANK + step) % RANKS) * WIDE + column
        tl.store(out + row * out_stride + at, received, mask=(column < WIDE) & (at < COLUMNS))
    for step in tl.static_range(1, RANKS):
        raise_flag(flags[(RANK + step) % RANKS] + (PROGRAMS + program) * RANKS + RANK, call)
    await_flags(flags[RANK] + (PROGRAMS + program) * RANKS, call, RANK, RANKS, WIDTH)
    tl.store(calls + program, call)


def takes(x: Tensor) -> bool:
    """Whole units without gaps."""
    return x.is_contiguous() and x.numel() % UNIT == 0


def two_shot(x: Tensor, residual: Tensor | None, out: Tensor, exchange: ShareExchange) -> None:
    """``out = sum(x of all ranks) + residual``, in fp32, in the order of the ranks, rounded once. All have one shape
    and dtype and `takes` them. As much is computed at a time as there is room for. `out` may be `x` or `residual`."""
    blocks, room = exchange.blocks(x.element_size()), exchange.room(x.element_size())
    if x.numel() > room:
        flat, into, before = x.view(-1), out.view(-1), None if residual is None else residual.view(-1)
        for part in (slice(begin, begin + room) for begin in range(0, len(flat), room)):
            two_shot(flat[part], None if before is None else before[part], into[part], exchange)
        return
    units = x.numel() // UNIT
    share_units = triton.cdiv(units, exchange.ranks)
    parts, results = exchange.regions(x.dtype)
    _two_shot[(triton.cdiv(share_units * UNIT, exchange.block),)](
        x,
        residual,
        out,
        parts,
        results,
        exchange.flags,
        exchange.calls,
        units,
        share_units,
        BLOCKS=blocks,
        UNIT=UNIT,
        **_options(exchange),
    )


def gather(part: Tensor, out: Tensor, exchange: ShareExchange) -> None:
    """``out [R, V]``: columns ``[rank * N, (rank + 1) * N)`` are those of ``part [R, N]`` of that rank, as far as V
    goes. Rows may lie apart; as many are computed at a time as there is room for. Raises ValueError where there is none
    for a row."""
    rows, wide = part.shape
    tiles = triton.cdiv(wide, exchange.block)
    blocks = exchange.blocks(part.element_size())
    at_once = blocks // tiles
    if at_once == 0:
        raise ValueError(
            f"a row of {wide} columns is more than the {blocks * exchange.block} that ranks exchange at a time"
        )
    parts, _ = exchange.regions(part.dtype)
    for begin in range(0, rows, at_once):
        some = slice(begin, begin + at_once)
        count = len(part[some])
        _gather[(count * tiles,)](
            part[some],
            out[some],
            parts,
            exchange.flags,
            exchange.calls,
            count,
            part.stride(0),
            out.stride(0),
            WIDE=wide,
            COLUMNS=out.shape[1],
            BLOCKS=blocks,
            **_options(exchange),
        )


def _options(exchange: ShareExchange) -> dict[str, object]:
    return {
        "RANK": exchange.rank,
        "RANKS": exchange.ranks,
        "WIDTH": triton.next_power_of_2(exchange.ranks),
        "PROGRAMS": len(exchange.calls),
        "BLOCK": exchange.block,
        "num_warps": WARPS,
    }
