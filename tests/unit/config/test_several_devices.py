"""Ranks and replicas on several devices: which ones a plan uses, what fits on them, and what is refused or lost."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllmd.architecture.families import architecture_of
from lightllmd.architecture.family import Architecture
from lightllmd.architecture.ranks import Rank, architecture_of_rank, rank_faults, sizes_of_rank
from lightllmd.architecture.schemes import SCHEMES, Scheme, scheme_of
from lightllmd.architecture.storage import weight_bytes
from lightllmd.architecture.weight_schemes import ALL_DENSE, WeightSchemes
from lightllmd.config import gpu_budget
from lightllmd.config.plan import Budget, Plan, decode_plan, encode_plan
from lightllmd.config.report import report
from lightllmd.config.weight_budget import weights_row
from lightllmd.engine import visible_devices
from lightllmd.errors import ConfigInvalid
from resolved import CPU, MODEL, PHI2, made, reason, refused, small
from several_devices import GB, LOST, gpus

# Llama-3.1-8B's shape.
LLAMA = msgspec.structs.replace(
    MODEL,
    hf_config={
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    context_length=131072,
)


def needed(plan: Plan) -> list[int]:
    return [budget.needed for budget in plan.device_budgets]


def free(budget: Budget) -> int:
    return budget.available - budget.needed


# --- which devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "tp", "replicas"), [(1, 1, 1), (2, 2, 1), (2, 1, 2), (8, 4, 2), (8, 2, 3), (8, 8, 1), (3, 2, 1)]
)
def test_each_rank_of_each_replica_has_a_device_of_its_own(count: int, tp: int, replicas: int) -> None:
    plan = decode_plan(encode_plan(made({"tp": tp, "engine.replicas": replicas}, gpus(*[140] * count), LLAMA)))
    assert (plan.ranks, plan.replicas, plan.devices) == (tp, replicas, list(range(tp * replicas)))
    assert len({plan.device_of(replica, rank) for replica in range(replicas) for rank in range(tp)}) == tp * replicas
    assert len(plan.device_budgets) == (tp * replicas if tp * replicas > 1 else 0)
    assert plan.budget_of(replicas - 1, tp - 1).needed == plan.budget.needed


def test_a_lost_device_is_passed_over() -> None:
    plan = made({"tp": 2}, gpus(140, 140, 100, lost=[1]), LLAMA)
    assert plan.devices == [0, 1]
    assert [device.bus_id[9:11] for device in plan.device.devices if device.index in plan.devices] == ["00", "02"]
    assert plan.device.memory_free == 100 * GB


def test_what_other_devices_have_free_does_not_count() -> None:
    busy, alone = made({}, gpus(140, 1), LLAMA), made({}, gpus(140), LLAMA)
    assert (busy.max_total_token_num, busy.device.memory_free) == (alone.max_total_token_num, 140 * GB)
    assert busy.warnings == []


def test_ranks_on_a_cpu_share_its_memory_and_its_cores() -> None:
    one, two, both = (
        made({"max_total_token_num": 10_000, **flags}, CPU)
        for flags in ({}, {"tp": 2}, {"tp": 2, "engine.replicas": 2})
    )
    assert (two.devices, two.device_budgets, two.device_of(0, 1)) == ([], [], 0)
    assert (one.threads, two.threads, both.threads) == (2, 1, 1)
    for name in ("runtime", "weights", "activations", "kv cache"):
        assert both.budget.row(name) == 2 * two.budget.row(name)
    assert two.budget.row("runtime") == 2 * one.budget.row("runtime")
    assert two.budget.row("kv cache") == one.budget.row("kv cache"), "each KV head is on one of them"
    assert two.budget.row("weights") == pytest.approx(one.budget.row("weights"), rel=0.001)
    assert two.budget.row("margin") == one.budget.row("margin")
    assert two.budget.row("communication") > one.budget.row("communication") == 0
    rows = {row.name: row.how for row in two.budget.rows}
    assert rows["runtime"].startswith("2 x 600 MB: ")
    assert rows["weights"].count(" x ") == 2, "three KV heads: the ranks differ"


# --- what fits ----------------------------------------------------------------------------------------------------


def test_slots_are_what_the_device_with_the_least_room_holds() -> None:
    even, uneven = made({"tp": 2}, gpus(60, 60), LLAMA), made({"tp": 2}, gpus(80, 60), LLAMA)
    assert uneven.max_total_token_num == even.max_total_token_num
    assert uneven.budget == uneven.device_budgets[1] == even.budget
    assert free(uneven.device_budgets[0]) > 10 * GB > 10**6 > free(uneven.budget)
    why = reason(uneven, "max_total_token_num")
    assert "on GPU 1 (NVIDIA H200 at 00000000:01:00.0), rank 1, which has the least room" in why
    (warning,) = uneven.warnings
    assert "GPU 1 (NVIDIA H200 at 00000000:01:00.0) has 60.0 GB free, 25% less than GPU 0" in warning
    assert even.warnings == made({"tp": 2}, gpus(60, 59), LLAMA).warnings == []


def test_ranks_on_gpus_of_different_kinds_are_warned_of_once() -> None:
    mixed = gpus(140, 140)
    mixed.devices[1] = msgspec.structs.replace(mixed.devices[1], name="NVIDIA L4", memory_free=139 * GB)
    (warning,) = made({"tp": 2}, mixed, LLAMA).warnings
    assert warning == "NVIDIA H200 and NVIDIA L4 compute together, at the pace of the slower"
    assert made({"engine.replicas": 2}, mixed, LLAMA).warnings == [], "each at its own"


def test_two_ranks_hold_more_than_twice_the_slots_of_one() -> None:
    one, two = made({}, gpus(40), LLAMA), made({"tp": 2}, gpus(40, 40), LLAMA)
    assert two.max_total_token_num > 2 * one.max_total_token_num
    assert two.budget.row("weights") == pytest.approx(one.budget.row("weights") / 2, rel=0.001)
    assert two.budget.row("communication") > gpu_budget.SPARE_CONTEXT / 2 > one.budget.row("communication") == 0
    assert two.budget.row("logits") > one.budget.row("logits"), "all of them on each rank"


def test_the_fullest_rank_decides_where_heads_do_not_divide() -> None:
    """Three KV heads of two ranks: the first one holds two."""
    plan = made({"tp": 2, "max_total_token_num": 10_000}, gpus(140, 140))
    first, second = plan.device_budgets
    assert first.row("kv cache") == 2 * second.row("kv cache")
    assert plan.budget == first
    assert "1 to 2 of 3 KV heads" in reason(plan, "ranks")
    repeated = made({"tp": 4, "max_total_token_num": 10_000}, gpus(*[140] * 4))
    assert len({budget.row("kv cache") for budget in repeated.device_budgets}) == 1
    assert "1 of 3 KV heads, which several ranks hold alike" in reason(repeated, "ranks")


def test_replicas_each_have_all_slots() -> None:
    one, two = made({}, gpus(40), LLAMA), made({"engine.replicas": 2}, gpus(40, 40), LLAMA)
    assert two.max_total_token_num == one.max_total_token_num
    assert two.device_budgets == [one.budget, one.budget]
    ports = made({"engine.replicas": 2, "tp": 2}, gpus(40, 40, 40, 40), LLAMA)
    assert [ports.rendezvous_port(replica) for replica in range(2)] == [28765, 28766]


def test_a_model_of_one_device_has_the_budget_that_it_had() -> None:
    alone = made({}, gpus(140), LLAMA)
    assert alone.budget.row("communication") == 0
    assert "communication" not in [row.name for row in alone.budget.rows]
    assert "ranks" not in [derived.name for derived in alone.derived]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "facts", "key", "said"),
    [
        (
            {"tp": 4},
            gpus(140, 140),
            "tp",
            "tp = 4 needs 4 GPUs, and there are 2 usable GPUs; tp = 2 is the most that fits",
        ),
        (
            {"tp": 2},
            gpus(140, 140, lost=[1]),
            "tp",
            f"tp = 2 needs 2 GPUs, and there is 1 usable GPU (NVIDIA H200 at 00000000:01:00.0: {LOST}); "
            "tp = 1 is the most that fits",
        ),
        (
            {"engine.replicas": 3},
            gpus(140, 140),
            "engine.replicas",
            "engine.replicas = 3 needs 3 GPUs, and there are 2 usable GPUs; engine.replicas = 2 is the most that fits",
        ),
        (
            {"tp": 2, "engine.replicas": 2},
            gpus(140, 140, 140),
            "engine.replicas",
            "engine.replicas = 2 of tp = 2 need 4 GPUs, and there are 3 usable GPUs; "
            "tp = 1 or engine.replicas = 1 is the most that fits",
        ),
        (
            {"tp": 4, "engine.replicas": 4},
            gpus(140, 140, 140),
            "engine.replicas",
            "engine.replicas = 4 of tp = 4 need 16 GPUs, and there are 3 usable GPUs; "
            "engine.replicas = 1 with tp = 3 is the most that fits",
        ),
    ],
)
def test_more_devices_than_there_are_are_refused_with_what_can_be_had(
    flags: dict[str, Any], facts: Any, key: str, said: str
) -> None:
    (problem,) = refused(flags, facts, LLAMA)
    assert (problem.key, problem.message) == (key, said)


def test_a_model_that_ranks_cannot_share_is_refused_at_plan_time() -> None:
    (problem,) = refused({"tp": 10}, gpus(*[140] * 10))
    assert problem.key == "tp"
    assert "9 query heads: 1 to 9 ranks" in problem.message
    (problem,) = refused({"tp": 10}, CPU)
    assert problem.key == "tp"
    outlined: dict[str, Any] = {"outline": PHI2, "model_type": "phi", "context_length": 2048}
    lengths = {"max_req_input_len": 1000, "max_req_total_len": 2000}
    (problem,) = refused({"tp": 2, **lengths}, gpus(140, 140), **outlined)
    assert (problem.key, "PhiForCausalLM" in problem.message, "tp = 1" in problem.message) == ("tp", True, True)
    plan = made({"engine.replicas": 2, **lengths}, gpus(140, 140), **outlined)
    assert (plan.ranks, plan.replicas) == (1, 2), "replicas are whole models"


def test_what_does_not_fit_is_refused_with_the_smallest_tp_that_does() -> None:
    (problem,) = refused({}, gpus(19, 19, 19, 19), LLAMA)
    assert "does not fit: 17.1 GB (0.9 of the free memory) may be used" in problem.message
    assert problem.message.endswith("; it fits with tp = 2")
    assert made({"tp": 2}, gpus(19, 19), LLAMA).ranks == 2
    (problem,) = refused({}, gpus(13), LLAMA)
    assert problem.message.endswith("; it fits with tp = 3, on 3 GPUs like this")
    with pytest.raises(ConfigInvalid):
        made({"tp": 2}, gpus(13, 13), LLAMA)
    assert made({"tp": 3}, gpus(13, 13, 13), LLAMA).ranks == 3
    (problem,) = refused({"engine.replicas": 4}, gpus(19, 19, 19, 19), LLAMA)
    assert problem.message.endswith("; it fits with tp = 2 and engine.replicas = 2")


def test_slots_that_do_not_fit_are_refused_with_the_number_and_the_tp_that_do() -> None:
    (problem,) = refused({"max_total_token_num": 400_000}, gpus(60, 60), LLAMA)
    assert problem.key == "max_total_token_num"
    largest = int(problem.message.partition("at most max_total_token_num = ")[2].split()[0])
    assert problem.message.endswith(" fits, or it fits with tp = 2")
    assert made({"max_total_token_num": largest}, gpus(60, 60), LLAMA).max_total_token_num == largest
    assert made({"max_total_token_num": 400_000, "tp": 2}, gpus(60, 60), LLAMA).ranks == 2
    (problem,) = refused({"max_total_token_num": 1_000_000, "tp": 2}, gpus(90, 60), LLAMA)
    assert "does not fit on GPU 1 (NVIDIA H200 at 00000000:01:00.0), rank 1: 54.0 GB" in problem.message


def test_on_a_cpu_fewer_ranks_are_proposed() -> None:
    (problem,) = refused({"tp": 9, "max_total_token_num": 4000}, small(4 * GB))
    assert problem.message.endswith("it fits with tp = 3")
    assert made({"tp": 3, "max_total_token_num": 4000}, small(4 * GB)).ranks == 3


# --- degrade --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "facts", "left", "lost"),
    [
        ({"tp": 2}, gpus(140, 140, lost=[0]), (1, 1, [0]), "the model is cut over 1 instead of tp = 2"),
        ({"tp": 4}, gpus(140, 140, 140), (3, 1, [0, 1, 2]), "the model is cut over 3 instead of tp = 4"),
        ({"engine.replicas": 2}, gpus(140, 140, lost=[1]), (1, 1, [0]), "1 of engine.replicas = 2 is served"),
        (
            {"tp": 2, "engine.replicas": 4},
            gpus(*[140] * 8, lost=[3]),
            (2, 3, [0, 1, 2, 3, 4, 5]),
            "3 of engine.replicas = 4 are served",
        ),
        (
            {"tp": 2, "engine.replicas": 2},
            gpus(140, 140, lost=[0]),
            (1, 1, [0]),
            "the model is cut over 1 instead of tp = 2 and 1 of engine.replicas = 2 is served",
        ),
    ],
)
def test_degrade_serves_what_the_devices_allow_and_says_what_is_lost(
    flags: dict[str, Any], facts: Any, left: tuple[int, int, list[int]], lost: str
) -> None:
    assert refused(flags, facts, LLAMA)
    plan = made({"engine.degrade": True, **flags}, facts, LLAMA)
    assert (plan.ranks, plan.replicas, plan.devices) == left
    (warning,) = plan.warnings
    assert warning.startswith("engine.degrade: of ")
    assert warning.endswith(lost)
    assert (LOST in warning) == any(device.fault for device in facts.devices)
    assert warning in report(plan)


def test_degrade_changes_nothing_where_all_is_there() -> None:
    whole, may = (made({"tp": 2, "engine.degrade": degrade}, gpus(140, 140), LLAMA) for degrade in (False, True))
    assert (may.warnings, may.ranks, may.max_total_token_num) == ([], 2, whole.max_total_token_num)


def test_degrade_takes_no_cut_that_the_model_does_not_have() -> None:
    plan = made({"tp": 12, "engine.degrade": True}, gpus(*[140] * 10))
    assert plan.ranks == 9, "as many as there are query heads"


def test_degrade_takes_the_slots_that_still_fit() -> None:
    flags = {"tp": 2, "max_total_token_num": 400_000, "engine.degrade": True}
    assert made(flags, gpus(60, 60), LLAMA).max_total_token_num == 400_000
    plan = made(flags, gpus(60, 60, lost=[1]), LLAMA)
    assert (plan.ranks, 100_000 < plan.max_total_token_num < 400_000) == (1, True)
    (warning,) = plan.warnings
    assert warning.endswith(f", with {plan.max_total_token_num} of 400000 KV slots")
    (problem,) = refused(flags, gpus(13, 13, lost=[1]), LLAMA)
    assert "does not fit" in problem.message


# --- what ranks hold ------------------------------------------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn) -> tuple[Architecture, int]:
    kv_heads = draw(st.integers(1, 8))
    heads = kv_heads * draw(st.integers(1, 4))
    config = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "intermediate_size": draw(st.integers(16, 700)),
        "vocab_size": draw(st.integers(8, 300)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    return architecture_of(draw(st.sampled_from(["llama", "qwen2", "gemma2"])), config), draw(
        st.integers(1, min(heads, 8))
    )


ORDERED = replace(SCHEMES["w4a16"], group=32, ordered=True)


@settings(max_examples=50)
@given(models(), st.sampled_from([*SCHEMES.values(), scheme_of("w4a16", 32), ORDERED]))
def test_planned_bytes_are_those_of_the_lists_of_weights_and_together_all_of_the_model(
    model: tuple[Architecture, int], scheme: Scheme
) -> None:
    whole, count = model
    schemes = WeightSchemes.all(scheme)
    assert rank_faults(whole, schemes, count) == []
    ranks = [architecture_of_rank(whole, schemes, Rank(index, count)) for index in range(count)]
    planned = [weights_row(rank, "bfloat16", schemes).bytes for rank in ranks]
    assert planned == [weight_bytes(rank.weights, 2, schemes) for rank in ranks]
    sizes = [sizes_of_rank(whole, schemes, Rank(index, count)) for index in range(count)]
    assert len(set(zip(sizes, planned, strict=True))) == len(set(sizes)), "equal sizes, equal bytes"
    ranks = [architecture_of_rank(whole, ALL_DENSE, Rank(index, count)) for index in range(count)]
    dense = [weights_row(rank, "bfloat16", ALL_DENSE).bytes for rank in ranks]
    attention, rows = whole.spec.attention[0], 300 + 16 * count
    copies = sum(rank.spec.attention[0].kv_heads for rank in ranks) - attention.kv_heads
    repeated = 2 * (2 * copies * attention.head_dim * (whole.spec.hidden + 1))  # layers x (keys and values, biases)
    once = [weight for weight in whole.weights if weight.shard_axis is None]
    padding = 2 * rows * whole.spec.hidden - 2 * whole.spec.vocab * whole.spec.hidden
    most = repeated + (count - 1) * sum(weight.elements for weight in once) + max(0, padding)
    all_of_it = weight_bytes(whole.weights, 2)
    assert all_of_it <= sum(dense) <= all_of_it + 2 * most


def test_the_report_names_devices_ranks_and_rendezvous() -> None:
    text = report(made({"tp": 2, "engine.replicas": 2}, gpus(140, 130, 140, 140, 70, lost=[4]), LLAMA))
    assert "devices: cuda, 4 of 4 usable\n" in text
    assert "processes: 2 x 2 ranks\n" in text
    assert "\nmemory of replica 0, rank 1:\n" in text, "which has 130 GB free"
    for place, (replica, rank) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        assert f"  replica {replica}, rank {rank}: GPU {place} (NVIDIA H200 at 00000000:0{place}:00.0), " in text
    assert f"NVIDIA H200 at 00000000:04:00.0: can't be used: {LOST}" in text
    assert "127.0.0.1:28765" in text
    assert "127.0.0.1:28766" in text
    alone = report(made({}, gpus(140, 140), LLAMA))
    assert "rendezvous" not in alone
    assert "replica" not in alone


def test_facts_without_a_list_of_devices_are_of_equal_ones() -> None:
    facts = msgspec.structs.replace(gpus(140, 140), devices=[])
    assert made({"tp": 2}, facts, LLAMA).devices == [0, 1]


def test_engines_see_the_devices_that_a_plan_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    facts = gpus(140, 140, 140, lost=[1])
    visible_devices.settle(made({"tp": 2}, facts, LLAMA))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2"
    visible_devices.settle(made({"tp": 2}, msgspec.structs.replace(facts, visible="GPU-0,GPU-2"), LLAMA))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-0,GPU-2"
