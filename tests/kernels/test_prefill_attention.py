"""Prefill attention is causal behind each row's cached tokens, and reads a row's own slots and nothing else."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from covering import covering
from kv_rows import KvRows, int32
from lightllmd.architecture.kv_schemes import KV_SCHEMES
from lightllmd.kernels import reference, split_prefill
from lightllmd.kernels.layout import Heads, PrefillTiles
from lightllmd.kernels.prefill_attention import TileShape, pairs_per_tile, prefill_attention, tile_shape, tiles_for
from lightllmd.kernels.segments import Partial

# numpy, which interprets, tells of the logarithm of no weight.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
SCALE = 0.3
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def check(
    counts: list[int],
    starts: list[int],
    group: int,
    dim: int,
    dtype: torch.dtype,
    device: str,
    shuffled: bool = False,
    before: int = 0,
    shape: TileShape | None = None,
    kv_heads: int = 2,
    segments: int = 1,
    scheme: str = "dense",
    bidirectional: dict[int, list[tuple[int, int]]] | None = None,
    **kind: Any,
) -> Tensor:
    """`before` tokens of other rows are packed before those of these. `kind`: window and cap; `bidirectional`: runs of
    each row, by its index. Returns what it has found right."""
    lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    rows = KvRows.of(lengths, kv_heads, dim, dtype, device, scheme=KV_SCHEMES[scheme])
    heads, total = kv_heads * group, before + sum(counts)
    qkv = torch.randn(total, heads + 2 * kv_heads, dim, generator=torch.Generator().manual_seed(1))
    q = qkv.to(device, dtype)[:, :heads]
    out = torch.full((total, heads, dim), float("nan"), dtype=dtype, device=device)
    ends = [before + sum(counts[: index + 1]) for index in range(len(counts))]
    first = [before, *ends[:-1]]
    pairs = pairs_per_tile(sum(counts), group) if segments == 1 else split_prefill.PAIRS
    tiles = torch.from_numpy(tiles_for(counts, starts, group, pairs))
    if shuffled:
        tiles = tiles[torch.randperm(len(tiles), generator=torch.Generator().manual_seed(2))]
    where = [int32(numbers, device) for numbers in ([len(tiles)], rows.table_rows, first, counts, starts)]
    if segments > 1:  # behind the tiles come some that are not counted, of a row that is not there
        tiles = torch.cat([tiles, torch.full((3, 2), 1 << 20, dtype=torch.int32)])
    tiled = PrefillTiles(tiles.to(device), *where, pairs, segments, [])
    if bidirectional is not None:
        seen = torch.full((total,), 1 << 20, dtype=torch.int32)
        for index, (begin, start, count) in enumerate(zip(first, starts, counts, strict=True)):
            seen[begin : begin + count] = torch.arange(start, start + count) + 1
            for low, high in bidirectional.get(index, []):
                seen[begin + low - start : begin + high - start] = high
        tiled.bidirectional = seen.to(device)
    given = q, rows.cache, Heads(heads, kv_heads, dim, SCALE, 0.0, **kind), rows.table, tiled, out
    if segments == 1:
        prefill_attention(*given, shape=shape)
    else:
        values = torch.full((total * heads, segments, dim), float("nan"), device=device)
        arrived = torch.zeros(len(tiles) * split_prefill.PAIRS // 16 * heads, dtype=torch.int32, device=device)
        split_prefill.split_prefill(*given, Partial(values, values[:, :, 0].clone(), arrived), shape=shape)
        assert not arrived.any()
    assert out[:before].isnan().all()
    for index, ((begin, end), slots) in enumerate(zip(pairwise([before, *ends]), rows.slots, strict=True)):
        runs = (bidirectional or {}).get(index, [])
        truth = reference.attention(q[begin:end], rows.kept, slots, SCALE, **kind, bidirectional=runs)
        tolerance = TOLERANCES[dtype] * (1 if scheme == "dense" else 2)
        torch.testing.assert_close(out[begin:end], truth, rtol=tolerance, atol=tolerance)
    return out


@covering(1, group=[1, 3, 4, 7, 16], dim=[64, 128])
def test_groups_of_query_heads(group: int, dim: int, dtypes: torch.dtype, device: str) -> None:
    check([9, 1], [0, 30], group, dim, dtypes, device)


@pytest.mark.parametrize("start", [0, 1, 31, 63, 64, 65])
@pytest.mark.parametrize("count", [1, 2, 33])
def test_rows_around_the_borders_of_blocks(start: int, count: int, dtypes: torch.dtype, device: str) -> None:
    check([count], [start], 2, 64, dtypes, device, kv_heads=1)


@pytest.mark.parametrize("shuffled", [False, True])
def test_several_rows_of_several_tiles_in_any_order(shuffled: bool, every_dtype: torch.dtype, device: str) -> None:
    check([40, 1, 70, 17], [0, 90, 5, 64], 3, 64, every_dtype, device, shuffled)


def test_rows_packed_behind_other_tokens_leave_those_alone(dtypes: torch.dtype, device: str) -> None:
    check([20, 3], [0, 12], 2, 64, dtypes, device, before=5)


@pytest.mark.parametrize("dim", [16, 32, 256])
def test_other_head_dims(dim: int, dtypes: torch.dtype, device: str) -> None:
    check([20, 3], [0, 12], 2, dim, dtypes, device)


def test_large_steps_use_large_tiles(dtypes: torch.dtype, device: str) -> None:
    counts, starts = [200, 64], [0, 130]
    assert pairs_per_tile(sum(counts), 16) == 128
    check(counts, starts, 16, 64, dtypes, device, kv_heads=1)


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize("block_n", [16, 128])
def test_shapes_of_every_size_give_the_same(block_m: int, block_n: int, dtypes: torch.dtype, device: str) -> None:
    shape = tile_shape(dtypes, 64, 64)._replace(block_m=block_m, block_n=block_n)
    check([40, 3], [0, 90], 3, 64, dtypes, device, shape=shape)


SMALL = TileShape(32, 32, 4, 3)


@pytest.mark.parametrize("segments", [2, 4, 8])
@pytest.mark.parametrize("start", [0, 30, 31, 64, 250])
def test_segments_of_keys_merge_to_the_whole(segments: int, start: int, dtypes: torch.dtype, device: str) -> None:
    """Some segments are empty, and of some a part of the tile sees nothing."""
    check([33], [start], 2, 32, dtypes, device, kv_heads=1, segments=segments, shape=SMALL)


@pytest.mark.parametrize(("group", "dim"), [(1, 64), (3, 16), (4, 128), (7, 32), (2, 256)])
def test_segments_of_every_group_and_head_dim(group: int, dim: int, dtypes: torch.dtype, device: str) -> None:
    check([20, 3], [150, 12], group, dim, dtypes, device, segments=2)


def test_segments_of_every_dtype(every_dtype: torch.dtype, device: str) -> None:
    check([20, 3], [150, 12], 3, 64, every_dtype, device, segments=4)


@pytest.mark.parametrize("shuffled", [False, True])
def test_programs_of_split_tiles_go_on_until_all_rows_are_done(
    shuffled: bool, dtypes: torch.dtype, device: str
) -> None:
    counts, starts = [2, 1, 60, 3, 2, 5, 2], [3, 90, 5, 64, 200, 0, 130]
    check(counts, starts, 3, 16, dtypes, device, shuffled, before=4, segments=4)


def test_how_many_segments_there_are_changes_nothing_but_rounding(device: str) -> None:
    def attended(segments: int) -> Tensor:
        return check([40], [300], 2, 64, torch.float32, device, kv_heads=1, segments=segments, shape=SMALL)

    whole = attended(1)
    for segments in (2, 4, 8):
        torch.testing.assert_close(attended(segments), whole, rtol=2e-6, atol=2e-6)


# Smaller than a block, of some blocks, larger than any row.
@pytest.mark.parametrize(("window", "segments"), [(1, 1), (1, 2), (20, 8), (70, 1), (70, 2), (400, 1), (400, 8)])
def test_a_window_hides_what_lies_before_it(segments: int, window: int, device: str) -> None:
    """Of prompts without and with a cached prefix. Tiles have pairs that see nothing of their first block."""
    counts, starts = [70, 1, 33], [0, 90, 150]
    check(counts, starts, 2, 16, torch.float32, device, kv_heads=1, segments=segments, shape=SMALL, window=window)


@pytest.mark.parametrize(("window", "segments"), [(None, 1), (None, 4), (9, 1), (9, 4), (40, 2)])
def test_tokens_of_a_bidirectional_run_see_those_behind_them(window: int | None, segments: int, device: str) -> None:
    """Runs inside one tile and over several, shorter and longer than the window, side by side, at both ends of what a
    row feeds and behind a cached prefix; a row has none."""
    counts, starts = [90, 5, 41], [0, 40, 33]
    runs = {0: [(0, 3), (7, 60), (60, 73)], 2: [(33, 35), (50, 74)]}
    kind = {"window": window, "bidirectional": runs}
    check(counts, starts, 2, 16, torch.float32, device, kv_heads=1, segments=segments, shape=SMALL, before=3, **kind)


@pytest.mark.parametrize("segments", [1, 2])
def test_a_bidirectional_run_under_a_cap_over_quantised_keys(
    segments: int, every_dtype: torch.dtype, device: str
) -> None:
    runs = {"bidirectional": {0: [(4, 39)]}, "window": 16, "soft_cap": 0.7}
    check([40, 3], [0, 90], 3, 64, every_dtype, device, kv_heads=1, segments=segments, scheme="int8", **runs)


@pytest.mark.parametrize("segments", [1, 4])
@pytest.mark.parametrize("window", [None, 40])
def test_scores_are_capped(window: int | None, segments: int, dtypes: torch.dtype, device: str) -> None:
    kind = {"window": window, "soft_cap": 0.5}
    check([40, 3], [0, 90], 3, 32, dtypes, device, kv_heads=1, segments=segments, shape=SMALL, **kind)


@pytest.mark.parametrize("group", [1, 3, 7, 16])
def test_tiles_cover_every_pair_once_the_heaviest_first(group: int) -> None:
    for counts, starts in ([1], [0]), ([100, 1, 300, 64], [0, 500, 7, 0]), ([3000, 2000], [0, 1500]):
        pairs = pairs_per_tile(sum(counts), group)
        tiles = tiles_for(counts, starts, group, pairs).tolist()
        every = [
            (row, tile) for row, count in enumerate(counts) for tile in range((count * group + pairs - 1) // pairs)
        ]
        assert sorted(map(tuple, tiles)) == every
        keys = [starts[row] + min((tile + 1) * pairs, counts[row] * group) // group for row, tile in tiles]
        assert keys == sorted(keys, reverse=True)


@covering(1, scheme=[name for name, scheme in KV_SCHEMES.items() if not scheme.dense], segments=[1, 2])
def test_quantised_keys_and_values_are_read_as_what_they_stand_for(
    scheme: str, segments: int, every_dtype: torch.dtype, device: str
) -> None:
    """Prompts, a part of one behind a cached one, and a token."""
    check([40, 1, 17], [0, 70, 33], 3, 64, every_dtype, device, kv_heads=1, scheme=scheme, segments=segments)


@covering(1, scheme=["int8", "int4", "fp8"], dim=[16, 32, 128, 256])
def test_quantised_heads_of_other_dims_behind_a_window_and_under_a_cap(
    scheme: str, dim: int, dtypes: torch.dtype, device: str
) -> None:
    check([20, 3], [0, 40], 2, dim, dtypes, device, kv_heads=1, scheme=scheme, window=21, soft_cap=0.7)
