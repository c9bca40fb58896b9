"""The first and the last gather of a step in Triton. Meaning: `reference`."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _copy_row(source, target, columns, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < columns
    row = tl.load(source + column, mask=inside)
    if SCALE is not None:
        row = (row.to(tl.float32) * SCALE).to(target.dtype.element_ty)
    tl.store(target + column, row, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["tokens", "rows", "positions", "slots"])
def _embed(
    tokens,
    rows,
    positions,
    slots,
    last,
    table,
    embedding,
    out,
    table_stride,
    embedding_stride,
    out_stride,
    columns,
    SCALE: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With FIRST the embedding has the COUNT rows from that token's on; others are zeros."""
    at = tl.program_id(0).to(tl.int64)
    token, row = tl.load(tokens + at), tl.load(rows + at).to(tl.int64)
    if token < 0:
        token = tl.load(last + row)
    tl.store(table + row * table_stride + tl.load(positions + at), tl.load(slots + at))
    if FIRST is None:
        _copy_row(embedding + token.to(tl.int64) * embedding_stride, out + at * out_stride, columns, SCALE, BLOCK)
    else:
        token -= FIRST
        if (token >= 0) & (token < COUNT):
            _copy_row(embedding + token.to(tl.int64) * embedding_stride, out + at * out_stride, columns, SCALE, BLOCK)
        else:
            column = tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], out.dtype.element_ty)
            tl.store(out + at * out_stride + column, zeros, mask=column < columns)


@triton.jit(do_not_specialize_on_alignment=["index"])
def _gather_rows(x, index, out, x_stride, out_stride, columns, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    _copy_row(x + tl.load(index + at).to(tl.int64) * x_stride, out + at * out_stride, columns, None, BLOCK)


def embed(
    tokens: Tensor,
    rows: Tensor,
    positions: Tensor,
    slots: Tensor,
    last: Tensor,
    table: Tensor,
    embedding: Tensor,
    out: Tensor,
    scale: float | None = None,
    first: int | None = None,
) -> None:
    """The tokens of a step: their slots join the table, their embeddings go to ``out [T, hidden]``, times `scale`.
    Where `first` is given, the embedding has rows from that token's on, and tokens without one have zeros.

    `tokens`, `rows`, `positions`, `slots`: int32 ``[T]``. A token below 0 stands for the newest of its table row, in
    ``last [R]`` int32. ``table [R, W]`` int32, ``embedding [V, hidden]``.
    """
    columns = out.shape[1]
    block = triton.next_power_of_2(columns)
    _embed[(tokens.shape[0],)](
        tokens,
        rows,
        positions,
        slots,
        last,
        table,
        embedding,
        out,
        table.stride(0),
        embedding.stride(0),
        out.stride(0),
        columns,
        SCALE=scale,
        FIRST=first,
        COUNT=None if first is None else len(embedding),
        BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
    )


def gather_rows(x: Tensor, index: Tensor, out: Tensor) -> None:
    """``x [T, N]``, ``index [R]`` int32 -> ``out [R, N]``."""
    rows, columns = out.shape
    block = triton.next_power_of_2(columns)
    _gather_rows[(rows,)](
        x,
        index,
        out,
        x.stride(0),
        out.stride(0),
        columns,
        BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
    )
