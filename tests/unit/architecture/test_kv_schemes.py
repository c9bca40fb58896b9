"""How much smaller a slot is where keys and values are quantised."""

from __future__ import annotations

import pytest

from lightllmd.architecture.kv_layout import KvLayout
from lightllmd.architecture.kv_schemes import KV_SCHEMES
from lightllmd.architecture.spec import GroupedQuery

# The largest size that attention gives to a slot of 128 elements a head, in bytes of a head.
BYTES = {"dense": 256, "int8": 130, "int8_group8": 160, "int4_group8": 96, "int4": 96, "fp8": 130}


@pytest.mark.parametrize("name", KV_SCHEMES)
def test_a_slot_has_values_and_scales(name: str) -> None:
    layout = KvLayout.of([GroupedQuery(32, 8, 128, 0.1), GroupedQuery(32, 4, 128, 0.1)], "bfloat16", name)
    assert layout.slot_bytes == (2 * 8 + 2 * 4) * BYTES[name]
    dense = KvLayout.of([GroupedQuery(32, 8, 128, 0.1)], "bfloat16")
    assert [layer.gathered_bytes for layer in layout.layers[:1]] == [dense.slot_bytes]


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_eight_bits_give_almost_twice_the_slots(name: str) -> None:
    attention = [GroupedQuery(32, 8, 128, 0.1)] * 32
    dense, quantised = (KvLayout.of(attention, "bfloat16", each).slot_bytes for each in ("dense", name))
    assert dense / quantised >= 1.9


def test_heads_of_any_size_are_whole_groups() -> None:
    scheme = KV_SCHEMES["int4"]
    assert [scheme.group_of(dim) for dim in (16, 20, 33, 64, 80, 96, 256)] == [16, 4, 1, 16, 16, 16, 16]
    assert [dim for dim in (16, 20, 33, 64) if not scheme.divides(dim)] == [33], "two elements share a byte"
    assert all(KV_SCHEMES["int8"].group_of(dim) == dim and KV_SCHEMES["int8"].divides(dim) for dim in (16, 33))
