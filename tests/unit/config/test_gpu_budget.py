"""An H100's memory under a model's plan: the sums by hand, what does not fit, the sizes that graphs are made for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightllmd.architecture.families import architecture_of
from lightllmd.config import bounds, gpu_budget
from lightllmd.config.load import load
from lightllmd.config.plan import DeviceFacts, Facts, ModelFacts, Plan
from lightllmd.config.resolve import budget_table, resolve
from lightllmd.errors import ConfigInvalid

H100 = DeviceFacts(
    "cuda", "NVIDIA H100 80GB HBM3", 1, 85_520_809_984, 84_900_000_000, ["bfloat16", "float16", "float32"], 16
)
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
QWEN3_06B = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}


def planned(config: dict[str, Any], flags: dict[str, Any] | None = None) -> Plan:
    kind = config["model_type"]
    elements = architecture_of(kind, config).parameters
    context = config["max_position_embeddings"]
    model = ModelFacts("/m", "dummy", kind, config, [], elements, 0, "bfloat16", context, [2], False, False)
    return resolve(load(None, {"model_dir": "m", "load_way": "DUMMY"} | (flags or {})), Facts(model, H100))


def row(plan: Plan, name: str) -> int:
    return next(row.bytes for row in plan.budget.rows if row.name == name)


def test_the_rows_of_an_8b_model_by_hand() -> None:
    plan = planned(LLAMA_8B)
    assert [row.name for row in plan.budget.rows] == [
        "weights",
        "kv cache",
        "activations",
        "decode workspace",
        "logits",
        "embeddings",
        "sampling tables",
        "tables",
        "graphs",
        "runtime",
        "spare engine",
        "margin",
    ]
    assert row(plan, "weights") == 8_030_261_248 * 2
    assert row(plan, "kv cache") == (plan.max_total_token_num + 1) * 32 * 2 * 8 * 128 * 2
    token = (4096 + 4096 + 48 * 128 + 32 * 128 + 28672 + 14336) * 2 + 128 * 4
    assert row(plan, "activations") == (8192 + 1000) * token + 64_000_000
    assert row(plan, "decode workspace") == 1000 * 32 * 129 * 4
    assert row(plan, "logits") == 512 * 128256 * (4 + 2 + 8)
    pooled = 512 * (4096 * (2 + 4) + 2 * 4 * 512)
    assert row(plan, "embeddings") == pooled + 2 * 4 * 1000 * 4096
    assert row(plan, "sampling tables") == 1001 * (128256 * 2 + 2 * 4008 * 4 + 512)
    assert row(plan, "tables") == pytest.approx(1001 * 3080 * 4 + 3080 * 128 * 4 + 10192 * 64)
    sizes = [*bounds.batch_sizes(1000), *bounds.PREFILL_SIZES]
    graphs = len(sizes) * 32 * gpu_budget.GRAPH_BYTES_PER_LAYER + sum(sizes) * 4096 * 2
    assert row(plan, "graphs") == graphs + max(bounds.PREFILL_SIZES) * token + 1000 * 32 * 129 * 4
    assert 400_000 < plan.max_total_token_num < 430_000
    assert "slots and 1 for padding" in budget_table(plan)


def test_the_rest_of_the_card_is_kv_cache() -> None:
    for config, flags in [
        (LLAMA_8B, {}),
        (QWEN3_06B, {}),
        (QWEN3_06B, {"data_type": "fp32", "tokenizer_mode": "slow"}),
    ]:
        plan = planned(config, flags)
        assert plan.budget.available == int(H100.memory_free * 0.9)
        assert 0 <= plan.budget.available - plan.budget.needed < 300_000
        (problem,) = refused(config, flags | {"max_total_token_num": plan.max_total_token_num + 1})
        assert f"at most max_total_token_num = {plan.max_total_token_num} fits" in problem.message
        exact = planned(config, flags | {"max_total_token_num": plan.max_total_token_num, "batch_max_tokens": 8192})
        assert exact.max_total_token_num == plan.max_total_token_num


def test_the_spare_engines_context_is_budgeted_where_one_is_kept() -> None:
    with_one, without = planned(LLAMA_8B), planned(LLAMA_8B, {"supervisor.spare_engine": False})
    assert with_one.budget.spare == row(with_one, "spare engine") == gpu_budget.SPARE_CONTEXT
    assert "spare engine" not in budget_table(without)
    assert without.budget.spare == 0
    given_up = row(without, "kv cache") - row(with_one, "kv cache")
    assert abs(given_up - gpu_budget.SPARE_CONTEXT) <= 32 * 2 * 8 * 128 * 2, "but for a part of a slot"


def refused(config: dict[str, Any], flags: dict[str, Any]) -> list[Any]:
    with pytest.raises(ConfigInvalid) as raised:
        planned(config, {"batch_max_tokens": 8192} | flags)
    return raised.value.problems


def test_a_tied_head_takes_nothing_on_a_gpu() -> None:
    assert row(planned(QWEN3_06B), "weights") == 596_049_920 * 2


def test_without_graphs_none_are_planned_and_fewer_rows_take_fewer() -> None:
    whole = row(planned(LLAMA_8B), "graphs")
    assert row(planned(LLAMA_8B, {"engine.cuda_graphs": False}), "graphs") == 0
    assert 0 < row(planned(LLAMA_8B, {"engine.graph_max_rows": 64}), "graphs") < whole


def test_blocks_beside_decode_rows_have_graphs_only_where_there_are_some_and_they_are_small() -> None:
    flags = {"running_max_req_size": 100, "splitfuse_mode": True}
    without = row(planned(LLAMA_8B, flags | {"splitfuse_mode": False}), "graphs")
    token = (4096 + 4096 + 48 * 128 + 32 * 128 + 28672 + 14336) * 2 + 128 * 4
    each = 32 * gpu_budget.GRAPH_BYTES_PER_LAYER
    sizes, split = [256, 256, 256, 228], row(planned(LLAMA_8B, flags), "prefill workspace")
    assert split == 132 * 128 * 129 * 4
    assert row(planned(LLAMA_8B, flags), "graphs") == without + 4 * each + sum(sizes) * 4096 * 2 + split
    large = flags | {"splitfuse_block_size": 1024}
    grown = 4 * each + (3 * 1024 + 996) * 4096 * 2 + split
    assert row(planned(LLAMA_8B, large), "graphs") == without + grown
    odd = flags | {"splitfuse_block_size": 40, "running_max_req_size": 1100}
    wider = row(planned(LLAMA_8B, odd), "graphs") - row(planned(LLAMA_8B, odd | {"splitfuse_mode": False}), "graphs")
    shapes = [tokens + beside for tokens, beside in bounds.mixed_shapes(planned(LLAMA_8B, odd).config.params)]
    assert shapes[-1] == 1100 + 20
    kept = len(shapes) * each + sum(shapes) * 4096 * 2 + split
    assert wider == kept + (1120 - 1100) * token
    assert row(planned(LLAMA_8B, flags | {"splitfuse_block_size": 2000}), "graphs") == without
    fewer = planned(LLAMA_8B, flags | {"engine.graph_max_rows": 64})
    assert 0 < row(fewer, "graphs") < row(planned(LLAMA_8B, flags), "graphs")


def test_few_rows_leave_room_for_the_logits_of_prompts() -> None:
    plan = planned(LLAMA_8B, {"running_max_req_size": 4})
    assert row(plan, "logits") == 128 * 128256 * (4 + 2 + 8)


def test_a_head_that_no_kernel_takes_is_refused_by_its_size() -> None:
    (problem,) = refused(LLAMA_8B | {"head_dim": 80}, {})
    assert "head_dim 80" in problem.message
    assert "64, 128" in problem.message


def test_batch_sizes_are_dense_where_small_and_end_at_the_most() -> None:
    assert bounds.batch_sizes(1) == [1]
    assert bounds.batch_sizes(6) == [1, 2, 4, 6]
    assert bounds.batch_sizes(256) == [
        1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256,
    ]  # fmt: skip
    assert bounds.batch_sizes(3000)[-12:] == [640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2304, 2560, 2816, 3000]
    assert bounds.graph_sizes(load(None, {"model_dir": "m", "engine.graph_max_rows": 20})) == [1, 2, 4, 8, 16]


@given(most=st.integers(1, 65536))
def test_padding_is_never_more_than_half(most: int) -> None:
    sizes = bounds.batch_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    assert all(after <= 2 * before for before, after in pairwise(sizes))
    assert all(after - before <= max(8, before / 4) for before, after in pairwise(sizes))


@given(rows=st.integers(1, 4096), most=st.integers(1, 4096), kv_heads=st.integers(1, 64), segments=st.integers(1, 64))
def test_the_decode_workspace_holds_every_split_within_the_bounds(
    rows: int, most: int, kv_heads: int, segments: int
) -> None:
    if rows <= most and rows * kv_heads * segments <= max(bounds.MOST_PROGRAMS, rows * kv_heads):
        assert rows * segments <= bounds.decode_parts(most, kv_heads)


@pytest.mark.parametrize("block", [1, 16, 31, 100, 256, 1000])
@pytest.mark.parametrize("most", [1, 20, 32, 100, 1000])
def test_every_block_that_is_fed_beside_rows_fits_a_padded_shape(block: int, most: int) -> None:
    params = planned(
        LLAMA_8B, {"running_max_req_size": most, "splitfuse_mode": True, "splitfuse_block_size": block}
    ).config.params
    shapes = bounds.mixed_shapes(params)
    for rows in range(1, most + 1):
        ahead, behind = next(shape for shape in shapes if shape[0] >= rows)
        assert block // 2 <= bounds.prefill_budget(block, rows) <= behind <= block
        if ahead <= min(block // 2, 256) and ahead % bounds.MIXED_STEP == 0:
            assert ahead + behind == block
