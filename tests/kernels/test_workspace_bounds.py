"""What the budget plans for a kernel's workspace is what its launches can take."""

from __future__ import annotations

import pytest
import torch

from lightllmd.config.bounds import PREFILL_ROWS, PREFILL_SIZES, SPLIT_LINES, decode_parts

pytest.importorskip("triton")

from lightllmd.kernels import split_prefill
from lightllmd.kernels.decode_attention import segments_for
from lightllmd.kernels.fused_attention import COUNTERS
from lightllmd.kernels.prefill_attention import tile_shape
from lightllmd.kernels.segments import workspace_size


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8, 32, 64])
@pytest.mark.parametrize("most", [1, 7, 256, 1000])
def test_decode_attention_has_no_more_segments_than_planned(kv_heads: int, most: int) -> None:
    for rows in range(1, most + 1):
        for width in (16, 3080, 1 << 20):
            assert rows * segments_for(rows, kv_heads, width) <= decode_parts(most, kv_heads)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8, 32, 64])
@pytest.mark.parametrize("group", [1, 3, 4, 16, 71])
def test_split_prefill_takes_no_more_than_planned_and_has_counters_for_all(kv_heads: int, group: int) -> None:
    for tokens in range(1, PREFILL_SIZES[-1] + 1):
        segments = split_prefill.segments_for(tokens, group, kv_heads, 1 << 20)
        assert workspace_size(tokens, kv_heads * group, 128, segments) <= SPLIT_LINES * 129
        tiles = tokens * group // split_prefill.PAIRS + PREFILL_ROWS + 1
        smallest = tile_shape(torch.float32, 256, split_prefill.PAIRS).block_m
        assert segments == 1 or tiles * (split_prefill.PAIRS // smallest) * kv_heads <= COUNTERS


def test_a_tile_is_split_among_about_as_many_programs_as_there_are_multiprocessors() -> None:
    for tokens, segments in ((32, 8), (128, 4), (224, 2), (256, 2), (512, 1), (1024, 1)):
        assert split_prefill.segments_for(tokens, 4, 8, 9000) == segments
    assert split_prefill.segments_for(224, 3, 3, 9000) == 4
    assert split_prefill.segments_for(128, 4, 8, 520) == 2, "longest rows are short"
    assert split_prefill.segments_for(128, 4, 8, 200) == 1
