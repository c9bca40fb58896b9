"""All-reduce of small messages in Triton: every rank sends all it has to every other one, and each makes the result by
itself, in the same order, so that all have the same bits.

What a rank sends lies in the others' memory in one of two turns, by the parity of the call. A rank overwrites what it
sent two calls ago; it has since received what the others sent one call ago, which they did after their kernel of two
calls ago had ended. The number of a call is counted on the device, for each program by itself, so that launches of any
size, in graphs and beside them, may follow each other as long as they do so in the same order on all ranks.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lightllmd.architecture.collectives_memory import LANE_BYTES, LANES
from lightllmd.kernels.collectives_signals import glance, receive, send

TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class Mail(NamedTuple):
    """Where a rank receives what others send in one shot."""

    boxes: tuple[Tensor, ...]  # int32 [2, ranks, programs, LANES, 4] of each rank, in its own memory
    calls: Tensor  # int32 [programs], this rank's: of each program the calls so far
    rank: int

    @property
    def programs(self) -> int:
        """The most that a launch may have."""
        return len(self.calls)


@triton.jit
def _widen(word, DTYPE: tl.constexpr):
    """The numbers in a word, in fp32."""
    if DTYPE == tl.float32:  # noqa: SIM300
        numbers = (word.to(tl.float32, bitcast=True),)
    else:
        low = (word & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        high = ((word >> 16) & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        numbers = (low, high)
    return numbers


@triton.jit
def _narrow(numbers, DTYPE: tl.constexpr):
    """The word of fp32 numbers, each rounded once."""
    if DTYPE == tl.float32:  # noqa: SIM300
        word = numbers[0].to(tl.int32, bitcast=True)
    else:
        low = numbers[0].to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        word = low | (numbers[1].to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return word


@triton.jit
def _joined(numbers, word, DTYPE: tl.constexpr, LARGEST: tl.constexpr):
    """`numbers` with those of another rank's word."""
    more = _widen(word, DTYPE)
    made = ()
    for at in tl.static_range(len(more)):
        if LARGEST:
            made = made + (tl.maximum(numbers[at], more[at], propagate_nan=tl.PropagateNan.ALL),)  # noqa: RUF005
        else:
            made = made + (numbers[at] + more[at],)  # noqa: RUF005
    return made


@triton.jit(do_not_specialize=["words"])
def _one_shot(
    x,
    residual,
    out,
    boxes,
    calls,
    words,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    LANES: tl.constexpr,
    DTYPE: tl.constexpr,
    LARGEST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Each lane has two words (32 bits) of ``x [words]``."""
    program = tl.program_id(0)
    lane = tl.arange(0, LANES)
    word = (program * LANES + lane) * 2
    has_low, has_high = word < words, word + 1 < words
    if PDL:
        # The next kernel's programs may read weights while this one waits for the other ranks.
        gdc_launch_dependents()
        gdc_wait()
    call = tl.load(calls + program) + 1
    low = tl.load(x + word, mask=has_low, other=0)
    high = tl.load(x + word + 1, mask=has_high, other=0)
    turn = (call & 1) * RANKS
    at = (program * LANES + lane) * 4
    for step in tl.static_range(1, RANKS):
        send(boxes[(RANK + step) % RANKS] + (turn + RANK) * (PROGRAMS * LANES * 4) + at, low, high, call)
    if residual is not None:
        old_low = tl.load(residual + word, mask=has_low, other=0)
        old_high = tl.load(residual + word + 1, mask=has_high, other=0)
    box = boxes[RANK] + at
    # One is waited for, then the others are asked for at once: by then most of them are there.
    after: tl.constexpr = (RANK + 1) % RANKS
    letter = box + (turn + after) * (PROGRAMS * LANES * 4)
    awaited = receive(letter, glance(letter), call)
    seen = ()
    for rank in tl.static_range(RANKS):
        if rank != RANK and rank != after:
            seen = seen + (glance(box + (turn + rank) * (PROGRAMS * LANES * 4)),)  # noqa: RUF005
        else:
            seen = seen + (awaited,)  # noqa: RUF005
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            its_low, its_high = low, high
        elif rank == after:
            its_low, its_high = awaited
        else:
            letter = box + (turn + rank) * (PROGRAMS * LANES * 4)
            its_low, its_high = receive(letter, seen[rank], call)
        if rank == 0:
            lows, highs = _widen(its_low, DTYPE), _widen(its_high, DTYPE)
        else:
            lows, highs = _joined(lows, its_low, DTYPE, LARGEST), _joined(highs, its_high, DTYPE, LARGEST)
    if residual is not None:
        lows, highs = _joined(lows, old_low, DTYPE, False), _joined(highs, old_high, DTYPE, False)
    tl.store(out + word, _narrow(lows, DTYPE), mask=has_low)
    tl.store(out + word + 1, _narrow(highs, DTYPE), mask=has_high)
    tl.debug_barrier()  # each thread has read it
    tl.store(calls + program, call)


def takes(x: Tensor) -> bool:
    """Whole words without gaps."""
    return x.is_contiguous() and x.dtype in TRITON_TYPES and x.numel() * x.element_size() % 4 == 0


def one_shot(
    x: Tensor, residual: Tensor | None, out: Tensor, mail: Mail, *, largest: bool = False, pdl: bool = False
) -> None:
    """``out = sum(x of all ranks) + residual``, in fp32, in the order of the ranks, rounded once; `largest`: their
    maximum instead, which is no number where one of them is none. All have one shape and dtype and are contiguous;
    `out` may be `x` or `residual`. `pdl`: see `skinny.linear`."""
    words = x.numel() * x.element_size() // 4
    programs = triton.cdiv(words, LANES * LANE_BYTES // 4)
    options = {"launch_pdl": True} if pdl else {}
    _one_shot[(programs,)](
        x.view(-1).view(torch.int32),
        None if residual is None else residual.view(-1).view(torch.int32),
        out.view(-1).view(torch.int32),
        mail.boxes,
        mail.calls,
        words,
        RANK=mail.rank,
        RANKS=len(mail.boxes),
        PROGRAMS=mail.programs,
        LANES=LANES,
        DTYPE=TRITON_TYPES[x.dtype],
        LARGEST=largest,
        PDL=pdl,
        num_warps=LANES // 32,
        **options,
    )
