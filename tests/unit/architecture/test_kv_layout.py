"""How large a slot of the KV cache is, and what the budget makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightllmd.architecture.families import architecture_of
from lightllmd.architecture.kv_layout import KvLayout
from lightllmd.architecture.spec import DecoderSpec
from lightllmd.config.budget import gathered_bytes

CONFIG = {
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 512,
    "vocab_size": 1000,
}


@pytest.fixture
def spec() -> DecoderSpec:
    """Its middle layer has fewer heads, of other size."""
    spec = architecture_of("llama", CONFIG).spec
    first, middle, last = spec.layers
    smaller = replace(middle, attention=replace(middle.attention, kv_heads=2, head_dim=16))
    return replace(spec, layers=(first, smaller, last))


@pytest.mark.parametrize(("dtype", "item"), [("bfloat16", 2), ("float32", 4)])
def test_a_slot_has_the_keys_and_values_of_each_layer(dtype: str, item: int, spec: DecoderSpec) -> None:
    layout = KvLayout.of(spec.attention, dtype)
    assert [layer.shape for layer in layout.layers] == [(8, 32), (4, 16), (8, 32)]
    assert layout.slot_bytes == (8 * 32 + 4 * 16 + 8 * 32) * item


def test_attention_gathers_the_largest_layer_and_more_where_scores_are_capped(spec: DecoderSpec) -> None:
    layout = KvLayout.of(spec.attention, "bfloat16")
    assert gathered_bytes(spec.attention, layout) == 8 * 32 * 2
    first = spec.layers[0]
    capped = replace(first, attention=replace(first.attention, soft_cap=50.0))
    # Keys and values of a head in fp32, and two fp32 numbers for each of the two query heads that share it.
    assert gathered_bytes([capped.attention, *spec.attention[1:]], layout) == 8 * 32 * 2 + 2 * 32 * 4 + 2 * 2 * 4
