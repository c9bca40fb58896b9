"""What the budget plans for a kernel's workspace is what its launches can take."""

from __future__ import annotations

import pytest

from lightllmd.config.bounds import decode_parts

pytest.importorskip("triton")

from lightllmd.kernels.decode_attention import segments_for


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8, 32, 64])
@pytest.mark.parametrize("most", [1, 7, 256, 1000])
def test_decode_attention_has_no_more_segments_than_planned(kv_heads: int, most: int) -> None:
    for rows in range(1, most + 1):
        for width in (16, 3080, 1 << 20):
            assert rows * segments_for(rows, kv_heads, width) <= decode_parts(most, kv_heads)
