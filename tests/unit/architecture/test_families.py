"""What families make of a config, and that nothing else knows them."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from lightllmd.architecture.families import FAMILIES, architecture_of
from lightllmd.architecture.spec import DecoderSpec
from lightllmd.errors import ConfigInvalid

ROOT = Path(__file__).parents[3]
GEMMA2: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
}


def gemma2(**changes: Any) -> DecoderSpec:
    return architecture_of("gemma2", GEMMA2 | changes).spec


def compared_with(path: Path) -> set[str]:
    """Strings that the code of a file compares something with."""
    compares = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Compare)]
    constants = [side.value for node in compares for side in ast.walk(node) if isinstance(side, ast.Constant)]
    return {value for value in constants if isinstance(value, str)}


def test_no_code_outside_the_families_compares_a_model_type() -> None:
    apart = {ROOT / "lightllmd/architecture/families", ROOT / "lightllmd/text"}  # tokenizers are named llama too
    files = [path for folder in ("lightllmd", "kernels") for path in (ROOT / folder).rglob("*.py")]
    assert [path for path in files if path.parent not in apart and compared_with(path) & FAMILIES.keys()] == []


def test_a_gemma2_config_without_its_entries_means_what_transformers_takes() -> None:
    spec = gemma2()
    attention = [layer.attention for layer in spec.layers]
    assert [one.window for one in attention] == [4096, None, 4096, None]
    assert {(one.head_dim, one.scale, one.soft_cap) for one in attention} == {(256, 1 / 16, 50.0)}
    assert (spec.tied, spec.logit_soft_cap, spec.embedding_scale, spec.norm.offset) == (True, 30.0, 8.0, 1.0)
    assert {layer.feed_forward.activation for layer in spec.layers} == {"gelu_tanh"}


def test_null_caps_and_a_null_window_mean_none() -> None:
    spec = gemma2(attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window=None)
    assert {(layer.attention.soft_cap, layer.attention.window) for layer in spec.layers} == {(None, None)}
    assert spec.logit_soft_cap is None


def test_the_layers_have_the_windows_that_the_config_names() -> None:
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    spec = gemma2(layer_types=kinds, sliding_window=7)
    assert [layer.attention.window for layer in spec.layers] == [None, None, 7, None]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, num_hidden_layers is 4"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types is .*a list of sliding_attention and full_attention"),
        ({"layer_types": "full_attention"}, "layer_types is"),
        ({"sliding_window": 0}, "sliding_window is 0, an integer from 1 to"),
        ({"attn_logit_softcapping": -1.0}, r"attn_logit_softcapping is -1\.0, a positive number"),
        ({"final_logit_softcapping": "x"}, "final_logit_softcapping is"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, a positive number"),
        ({"hidden_activation": "tanh"}, 'hidden_activation "tanh" is not available yet'),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention: .*not available yet"),
    ],
)
def test_what_gemma2_cannot_be_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigInvalid, match=words):
        gemma2(**changes)


# As the hub has the one of 4 billion parameters.
GEMMA3: dict[str, Any] = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}


def gemma3(**changes: Any) -> DecoderSpec:
    return architecture_of("gemma3_text", GEMMA3 | changes).spec


def test_a_gemma3_config_without_its_entries_means_what_transformers_takes() -> None:
    spec = gemma3()
    windows = [attention.window for attention in spec.attention]
    assert windows == [None if layer % 6 == 5 else 1024 for layer in range(34)]
    assert [attention.rotary for attention in spec.attention] == [int(window is not None) for window in windows]
    (windowed,) = spec.other_positions
    assert (spec.positions.kind, spec.positions.base, spec.positions.factor) == ("linear", 1e6, 8.0)
    assert (windowed.kind, windowed.base) == ("default", 1e4)
    assert spec.rotated == 512
    first = spec.attention[0]
    assert (first.heads, first.kv_heads, first.head_dim, first.soft_cap, first.qk_norm) == (8, 4, 256, None, "head")
    assert (spec.vocab, spec.tied, spec.logit_soft_cap, spec.norm.offset) == (262208, True, None, 1.0)


def test_gemma3_reads_the_rotary_positions_of_both_kinds_of_layers_in_either_spelling() -> None:
    both = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert gemma3(rope_scaling=None, rope_parameters=both) == gemma3()
    assert gemma3(rope_theta=5e5, rope_local_base_freq=2e4).positions.base == 5e5
    assert gemma3(rope_local_base_freq=2e4).other_positions[0].base == 2e4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention: .*not available yet"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not available yet"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, num_hidden_layers is 34"),
    ],
)
def test_what_gemma3_cannot_be_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigInvalid, match=words):
        gemma3(**changes)
