"""What the ranks of a group hold, put together, is the model; what one computes is enough for its heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllmd.architecture.families import FAMILIES, architecture_of
from lightllmd.architecture.family import Architecture
from lightllmd.architecture.outline import Outline
from lightllmd.architecture.ranks import ALONE, Rank, architecture_of_rank, rank_faults
from lightllmd.architecture.schemes import SCHEMES, scheme_of
from lightllmd.architecture.storage import weight_bytes
from lightllmd.architecture.weight_schemes import ALL_DENSE, WeightSchemes
from lightllmd.architecture.weights import Part

CONFIG = {"num_hidden_layers": 2, "tie_word_embeddings": False}


@st.composite
def models(draw: st.DrawFn) -> tuple[Architecture, int]:
    """A model of any family, and how many ranks it is shared by."""
    kv_heads = draw(st.integers(1, 9))
    heads = kv_heads * draw(st.integers(2 if kv_heads == 1 else 1, 8))
    config = {
        "hidden_size": 8 * draw(st.integers(1, 9)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 9)),
        "intermediate_size": draw(st.integers(16, 700)),
        "vocab_size": draw(st.integers(1, 300)),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }
    config["rope_scaling"] = {"mrope_section": [config["head_dim"] // 2, 0, 0]}  # where a family has such positions
    family = draw(st.sampled_from(sorted(FAMILIES)))
    return architecture_of(family, CONFIG | config), draw(st.integers(2, min(heads, 16)))


SCHEME_NAMES = st.sampled_from(sorted(SCHEMES))


def ranks_of(architecture: Architecture, count: int, schemes: WeightSchemes = ALL_DENSE) -> list[Architecture]:
    assert rank_faults(architecture, schemes, count) == []
    return [architecture_of_rank(architecture, schemes, Rank(index, count)) for index in range(count)]


def held(part: Part) -> list[int]:
    """The rows or columns that a rank holds."""
    assert part.cut is not None
    return [place for begin, end in part.cut.runs for place in range(begin, end)]


@settings(max_examples=50, deadline=None)
@given(models(), SCHEME_NAMES)
def test_parts_put_together_are_the_weights_and_only_kv_heads_repeat(
    model: tuple[Architecture, int], name: str
) -> None:
    architecture, count = model
    ranks = ranks_of(architecture, count, WeightSchemes.all(SCHEMES[name]))
    for whole, *parts in zip(architecture.weights, *(rank.weights for rank in ranks), strict=True):
        if whole.shard_axis is None:
            assert all(part == whole for part in parts)
            continue
        for number, stored in enumerate(whole.parts):
            found = Counter(place for one in parts for place in held(one.parts[number]))
            assert sorted(found) == list(range(stored.shape[whole.shard_axis]))
            for one in parts:
                part = one.parts[number]
                assert part.cut is not None
                assert part.cut.shape == stored.shape
                assert one.whole == whole
                padding = part.shape[whole.shard_axis] - len(held(part))
                assert padding == 0 or whole.role in ("embed", "head")
            if stored.kind not in ("k", "v", "qkv", "k_norm"):
                assert set(found.values()) == {1}
        assert sum(len(one.bias) for one in parts) == len(whole.bias) * (1 if whole.shard_axis else count)


@settings(max_examples=50, deadline=None)
@given(models())
def test_a_rank_has_the_kv_heads_of_its_query_heads_and_reads_what_it_computes(model: tuple[Architecture, int]) -> None:
    architecture, count = model
    for index, rank in enumerate(ranks_of(architecture, count)):
        for whole, layer in zip(architecture.spec.layers, rank.spec.layers, strict=True):
            attention = layer.attention
            each = whole.attention.heads // whole.attention.kv_heads
            assert attention.heads % attention.kv_heads == 0
            assert attention.heads > 0
            assert layer.feed_forward.intermediate > 0
            assert attention.shared is not None
            assert attention.shared.heads == whole.attention.heads
            if attention.shared.repeats:
                assert index > 0
                assert attention.kv_heads == 1
            by_kind = {
                part.kind: held(part) for one in rank.weights if one.layer == 0 for part in one.parts if part.cut
            }
            dim, out = attention.head_dim, by_kind["attention_out"]
            assert len(out) == attention.q_size
            assert out == list(range(out[0], out[0] + len(out)))
            assert by_kind["down"] == by_kind["gate"] == by_kind["up"]
            if "q" in by_kind:
                assert by_kind["q"] == out
                assert by_kind["k"] == by_kind["v"]
                # Query head h reads KV head h // each; a rank's own i-th reads its (i // its own group)-th.
                group = attention.heads // attention.kv_heads
                for head in range(attention.heads):
                    theirs = by_kind["q"][head * dim] // dim // each
                    assert by_kind["k"][head // group * dim] // dim == theirs


def test_one_rank_has_the_architecture_as_it_is() -> None:
    architecture = architecture_of("llama", CONFIG | WIDE)
    assert architecture_of_rank(architecture, ALL_DENSE, ALONE) is architecture


WIDE = {
    "hidden_size": 1024,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 1000,
}


def test_groups_of_a_scheme_stay_whole_where_shares_stay_fair() -> None:
    architecture = architecture_of("llama", CONFIG | WIDE)
    ranks = ranks_of(architecture, 3, WeightSchemes.all(SCHEMES["w4a16"]))
    assert [rank.spec.layers[0].feed_forward.intermediate for rank in ranks] == [512, 512, 512]
    assert [rank.spec.attention[0].heads for rank in ranks] == [4, 3, 7]
    downs = [weight for rank in ranks for weight in rank.weights if weight.role == "down"]
    assert all(weight.group == 0 for weight in downs)


def test_a_group_that_is_cut_becomes_smaller_ones_with_the_same_scales() -> None:
    architecture = architecture_of("llama", CONFIG | WIDE | {"intermediate_size": 96})
    schemes = WeightSchemes.all(scheme_of("w4a16", 32))
    first, second = ranks_of(architecture, 2, schemes)
    down = next(weight for weight in second.weights if weight.role == "down")
    assert held(down.parts[0])[0] == 48
    assert (down.group, schemes.of(down).group) == (16, 16)
    assert schemes.of(next(weight for weight in first.weights if weight.role == "down")).group == 32


def test_inputs_that_are_rounded_by_one_scale_on_several_ranks_are_known() -> None:
    architecture = architecture_of("llama", CONFIG | WIDE)

    def together(name: str, role: str) -> set[int]:
        ranks = ranks_of(architecture, 2, WeightSchemes.all(SCHEMES[name]))
        return {weight.rounded_together for rank in ranks for weight in rank.weights if weight.role == role}

    assert together("w8a8", "down") == {1536}
    assert together("w8a8", "qkv") == together("w8a16", "down") == {0}
    assert together("fp8_block", "down") == {0}  # blocks of 128 stay whole
    assert together("fp8_block", "attention_out") == {128}  # 7 heads of 64 end inside one


def test_what_each_rank_takes_is_no_more_than_its_share_and_what_all_repeat() -> None:
    architecture = architecture_of("qwen2", CONFIG | WIDE | {"num_attention_heads": 16, "num_key_value_heads": 8})
    whole = weight_bytes(architecture.weights, 2)
    shared = weight_bytes((one for one in architecture.weights if one.shard_axis is not None), 2)
    for count in (2, 4):
        for rank in ranks_of(architecture, count):
            assert weight_bytes(rank.weights, 2) == pytest.approx(whole - shared + shared / count, rel=0.01)


def faults(count: int, **config: int) -> Iterator[str]:
    yield from rank_faults(architecture_of("llama", CONFIG | WIDE | config), ALL_DENSE, count)


def test_what_can_not_be_shared_is_refused_with_names_and_bounds() -> None:
    assert list(faults(14)) == []
    assert list(faults(15)) == ["tp is 15, but the model has 14 query heads: 1 to 14 ranks can share them"]
    assert list(faults(2, intermediate_size=1)) == ["tp is 2, but intermediate_size is 1: 1 to 1 ranks can share it"]
    outline = Outline("MixtralForCausalLM", "model", 10, 10, (), 10, 0, {})
    assert rank_faults(outline, ALL_DENSE, 1) == []
    (fault,) = rank_faults(outline, ALL_DENSE, 2)
    assert "tp is 2" in fault
    assert "MixtralForCausalLM" in fault
