"""Decode attention computes what the reference says, from a row's own slots and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from covering import covering
from kv_rows import KvRows, int32
from lightllmd.architecture.kv_schemes import KV_SCHEMES
from lightllmd.kernels import reference
from lightllmd.kernels.decode_attention import (
    DecodeTiles,
    decode_attention,
    decode_tiles,
    segments_for,
)
from lightllmd.kernels.layout import Heads
from lightllmd.kernels.segments import Partial

SCALE = 0.3
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# none, one, around the borders of blocks of 16, 32 and 64 tokens
LENGTHS = [0, 1, 15, 16, 17, 32, 33, 63, 64, 65, 127, 129]
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["two launches", "one launch"])


def attend(
    rows: KvRows,
    q: Tensor,
    lengths: list[int],
    segments: int,
    packed: bool = True,
    fused: bool = False,
    padding: int = 0,
    tiles: DecodeTiles | None = None,
    **kind: Any,
) -> Tensor:
    """The last `padding` of the rows of `q` are padding, the others have `lengths`. `kind`: window and cap."""
    device, (batch, heads, dim) = str(q.device), q.shape
    shape = Heads(heads, rows.kv_heads, dim, SCALE, 0.0, **kind)
    out = torch.full((batch, heads, dim), float("nan"), dtype=q.dtype, device=device)
    values = torch.full((batch * heads, segments, dim), float("nan"), device=device)
    arrived = torch.zeros(batch * heads, dtype=torch.int32, device=device) if fused else None
    partial = Partial(values, values[:, :, 0].clone(), arrived) if segments > 1 else None
    table_rows = int32(rows.table_rows + [len(rows.table) - 1] * padding, device)
    positions = int32([length - 1 for length in lengths] + [0] * padding, device)
    for _ in range(2 if fused else 1):  # a graph replays the launch with what it left behind
        decode_attention(
            *(q, rows.cache, shape, rows.table, table_rows, positions, out, partial),
            segments=segments,
            packed=packed,
            tiles=tiles,
        )
    if arrived is not None:
        assert not arrived.any()
    return out


def queries(batch: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    """A part of the packed product, so that tokens lie apart."""
    qkv = torch.randn(batch, heads + 2 * kv_heads, dim, generator=torch.Generator().manual_seed(1))
    return qkv.to(device, dtype)[:, :heads]


def check(out: Tensor, q: Tensor, rows: KvRows, lengths: list[int], **kind: Any) -> None:
    tolerance = TOLERANCES[q.dtype] * (1 if rows.cache.scheme.dense else 2)
    for index, length in enumerate(lengths):
        truth = torch.zeros_like(q[index])
        if length:
            truth = reference.attention(q[index : index + 1], rows.kept, rows.slots[index], SCALE, **kind)[0]
        torch.testing.assert_close(out[index], truth, rtol=tolerance, atol=tolerance)


@FUSED
@pytest.mark.parametrize("segments", [1, 2, 8])
def test_rows_of_every_length_around_the_borders(segments: int, fused: bool, dtypes: torch.dtype, device: str) -> None:
    rows = KvRows.of(LENGTHS, 1, 64, dtypes, device)
    q = queries(len(LENGTHS), 2, 1, 64, dtypes, device)
    check(attend(rows, q, LENGTHS, segments, fused=fused), q, rows, LENGTHS)


@FUSED
def test_rows_of_every_dtype(fused: bool, every_dtype: torch.dtype, device: str) -> None:
    lengths = [129, 0, 33, 64]
    rows = KvRows.of(lengths, 2, 64, every_dtype, device)
    q = queries(4, 6, 2, 64, every_dtype, device)
    check(attend(rows, q, lengths, 4, fused=fused), q, rows, lengths)


@covering(1, group=[1, 3, 4, 7, 16], dim=[64, 128])
def test_groups_of_query_heads(group: int, dim: int, dtypes: torch.dtype, device: str) -> None:
    lengths = [70, 3]
    rows = KvRows.of(lengths, 2, dim, dtypes, device)
    q = queries(2, 2 * group, 2, dim, dtypes, device)
    check(attend(rows, q, lengths, 2), q, rows, lengths)


@FUSED
@pytest.mark.parametrize("packed", [True, False])
def test_heads_of_a_group_share_a_program_or_not(packed: bool, fused: bool, dtypes: torch.dtype, device: str) -> None:
    lengths = [70, 3, 40]
    rows = KvRows.of(lengths, 2, 64, dtypes, device)
    q = queries(3, 6, 2, 64, dtypes, device)
    check(attend(rows, q, lengths, 4, packed, fused), q, rows, lengths)


@pytest.mark.parametrize("segments", [32, 64])
def test_many_segments_are_merged_by_the_last_program(segments: int, dtypes: torch.dtype, device: str) -> None:
    """More than it holds at once."""
    lengths = [16 * 40]
    rows = KvRows.of(lengths, 1, 128, dtypes, device)
    q = queries(1, 12, 1, 128, dtypes, device)
    tiles = decode_tiles(dtypes, 128)._replace(block_n=16)
    check(attend(rows, q, lengths, segments, fused=True, tiles=tiles), q, rows, lengths)


@pytest.mark.parametrize("dim", [16, 32, 256])
def test_other_head_dims(dim: int, dtypes: torch.dtype, device: str) -> None:
    lengths = [70, 3]
    rows = KvRows.of(lengths, 1, dim, dtypes, device)
    q = queries(2, 5, 1, dim, dtypes, device)
    check(attend(rows, q, lengths, 2), q, rows, lengths)


@FUSED
def test_padding_of_a_graph_reads_its_own_slot_and_changes_no_row(
    fused: bool, dtypes: torch.dtype, device: str
) -> None:
    lengths = [33, 100]
    rows = KvRows.of(lengths, 2, 64, dtypes, device)
    q = queries(5, 6, 2, 64, dtypes, device)
    out = attend(rows, q, lengths, 4, fused=fused, padding=3)
    check(out[:2], q[:2], rows, lengths)
    assert not out[2:].any()  # the padding's slot holds zeros


@pytest.mark.parametrize("segments", [1, 2, 8])
def test_a_row_does_not_depend_on_the_rows_around_it(segments: int, dtypes: torch.dtype, device: str) -> None:
    lengths = [129, 5, 64]
    rows = KvRows.of(lengths, 2, 64, dtypes, device)
    q = queries(3, 4, 2, 64, dtypes, device)
    together = attend(rows, q, lengths, segments)
    for index, length in enumerate(lengths):
        alone = replace(rows, table_rows=[rows.table_rows[index]], slots=[rows.slots[index]])
        assert torch.equal(attend(alone, q[index : index + 1], [length], segments)[0], together[index])


@pytest.mark.parametrize("block_n", [16, 32, 64, 128])
def test_tiles_of_every_size_give_the_same(block_n: int, dtypes: torch.dtype, device: str) -> None:
    lengths = [130, 16]
    rows = KvRows.of(lengths, 1, 64, dtypes, device)
    q = queries(2, 4, 1, 64, dtypes, device)
    tiles = decode_tiles(dtypes, 64)._replace(block_n=block_n)
    check(attend(rows, q, lengths, 4, tiles=tiles), q, rows, lengths)


# Smaller than a block, at its border, of several, and larger than any row.
@pytest.mark.parametrize(
    ("window", "segments", "fused"), [(1, 4, True), (16, 1, False), (33, 8, True), (100, 4, False), (200, 8, True)]
)
def test_a_window_hides_what_lies_before_it(segments: int, fused: bool, window: int, device: str) -> None:
    rows = KvRows.of(LENGTHS, 1, 32, torch.float32, device)
    q = queries(len(LENGTHS), 2, 1, 32, torch.float32, device)
    tiles = decode_tiles(torch.float32, 32)._replace(block_n=16)
    out = attend(rows, q, LENGTHS, segments, fused=fused, tiles=tiles, window=window)
    check(out, q, rows, LENGTHS, window=window)


def test_what_lies_before_a_window_is_not_read(device: str) -> None:
    """It holds NaN, which would show even with no weight."""
    rows = KvRows.of([150, 40], 1, 32, torch.float32, device)
    q = queries(2, 2, 1, 32, torch.float32, device)
    truth = attend(rows, q, [150, 40], 4, window=50)
    rows.cache.entries[rows.slots[0][:100]] = float("nan")
    assert torch.equal(attend(rows, q, [150, 40], 4, window=50), truth)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_scores_are_capped(cap: float, window: int | None, dtypes: torch.dtype, device: str) -> None:
    lengths, kind = [70, 3], {"window": window, "soft_cap": cap}
    rows = KvRows.of(lengths, 2, 64, dtypes, device)
    q = queries(2, 6, 2, 64, dtypes, device) * 3
    check(attend(rows, q, lengths, 2, **kind), q, rows, lengths, **kind)


def test_segments_fill_the_device_and_no_more() -> None:
    assert segments_for(1, 8, 16384) == 32
    assert segments_for(1, 8, 300) == 8  # no more than blocks
    assert segments_for(8, 8, 16384) == 4
    assert segments_for(32, 8, 16384) == segments_for(256, 8, 16384) == 1
    assert segments_for(1, 1, 10) == 1
    for batch in range(1, 1100, 7):
        segments = segments_for(batch, 8, 1 << 20)
        assert segments in (1, 2, 4, 8, 16, 32, 64)
        assert segments == 1 or batch * 8 * segments <= 2 * 132


QUANTISED = [name for name, scheme in KV_SCHEMES.items() if not scheme.dense]


@pytest.mark.parametrize("scheme", QUANTISED)
def test_quantised_keys_and_values_are_read_as_what_they_stand_for(
    scheme: str, every_dtype: torch.dtype, device: str
) -> None:
    lengths = [129, 0, 33]
    rows = KvRows.of(lengths, 2, 64, every_dtype, device, scheme=KV_SCHEMES[scheme])
    q = queries(len(lengths), 6, 2, 64, every_dtype, device)
    check(attend(rows, q, lengths, 4, fused=True), q, rows, lengths)


@covering(1, scheme=QUANTISED, dim=[16, 32, 128, 256])
def test_quantised_heads_of_other_dims(scheme: str, dim: int, dtypes: torch.dtype, device: str) -> None:
    lengths = [70, 3]
    rows = KvRows.of(lengths, 1, dim, dtypes, device, scheme=KV_SCHEMES[scheme])
    q = queries(len(lengths), 3, 1, dim, dtypes, device)
    check(attend(rows, q, lengths, 2, packed=dim != 32), q, rows, lengths)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_keys_behind_a_window_and_under_a_cap(scheme: str, dtypes: torch.dtype, device: str) -> None:
    lengths, kind = [129, 40], {"window": 37, "soft_cap": 0.7}
    rows = KvRows.of(lengths, 1, 64, dtypes, device, scheme=KV_SCHEMES[scheme])
    q = queries(2, 4, 1, 64, dtypes, device)
    check(attend(rows, q, lengths, 2, **kind), q, rows, lengths, **kind)
