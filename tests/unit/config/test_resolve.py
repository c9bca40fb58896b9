"""Resolution: auto values with their reasons, what does not fit with what would, and the memory budget."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllmd.config import budget
from lightllmd.config.load import load
from lightllmd.config.plan import DeviceFacts, Facts, Scoring, decode_plan, encode_plan
from lightllmd.config.resolve import budget_table, located, report, resolve
from lightllmd.errors import ConfigInvalid, Problem
from resolved import CPU, FILE, GPU, MODEL, SMOLLM2, made, reason, refused, small

# --- values --------------------------------------------------------------------------------------------------------


def test_every_value_is_settled_and_each_derived_one_has_a_reason() -> None:
    plan = made()
    assert (plan.data_type, plan.eos_id, plan.tokenizer_mode) == ("bfloat16", [2, 7], "fast")
    assert (plan.batch_max_tokens, plan.log_stats_interval) == (8192, 10.0)
    assert (plan.vocab_size, plan.model_name, plan.config_file) == (49152, "smollm2", FILE)
    assert {derived.name for derived in plan.derived} == {
        "context",
        "device",
        "data_type",
        "eos_id",
        "batch_max_tokens",
        "max_total_token_num",
        "tokenizer_mode",
        "log_stats_interval",
    }
    assert all(derived.reason for derived in plan.derived)


def test_what_is_written_is_not_derived() -> None:
    flags = {
        "data_type": "fp32",
        "eos_id": [5],
        "tokenizer_mode": "slow",
        "max_total_token_num": 6000,
        "batch_max_tokens": 4000,
        "log_stats_interval": 2.5,
        "max_req_total_len": 4000,
        "engine.device": "cpu",
        "http.served_model_name": "mine",
    }
    plan = made(flags)
    assert (plan.data_type, plan.eos_id, plan.tokenizer_mode) == ("float32", [5], "slow")
    assert (plan.max_total_token_num, plan.batch_max_tokens, plan.log_stats_interval) == (6000, 4000, 2.5)
    assert plan.model_name == "mine"
    assert [derived.name for derived in plan.derived] == ["context"]


def test_resolution_is_pure() -> None:
    assert made() == made()
    assert decode_plan(encode_plan(made())) == made()


@pytest.mark.parametrize(
    ("native", "fast", "expected", "because"),
    [
        ("bfloat16", ["bfloat16", "float32"], "bfloat16", "the checkpoint's own"),
        ("float32", ["bfloat16", "float32"], "float32", "the checkpoint's own"),
        ("float16", ["bfloat16", "float32"], "bfloat16", "slow at float16"),
        ("float16", ["bfloat16", "float16", "float32"], "float16", "the checkpoint's own"),
        ("bfloat16", ["float32"], "float32", "slow at bfloat16"),
        (None, ["bfloat16", "float32"], "bfloat16", "names none, so float16; but this CPU is slow at float16"),
        (None, ["float32"], "float32", "slow at float16"),
        (None, ["float16", "float32"], "float16", "names none, so float16"),
    ],
)
def test_data_type(native: str | None, fast: list[str], expected: str, because: str) -> None:
    plan = made(device=msgspec.structs.replace(CPU, fast_dtypes=fast), checkpoint_dtype=native)
    assert plan.data_type == expected
    assert because in reason(plan, "data_type")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"max_total_token_num": 6000}, 3072),
        ({"max_total_token_num": 30000}, 5000),
        ({"max_total_token_num": 6000, "max_req_total_len": 6000}, 6000),
        ({}, 8192),
        ({"max_req_total_len": 8192, "batch_max_tokens": 9000}, 9000),
        ({"max_total_token_num": 6000, "splitfuse_mode": True}, 1000),
        ({"max_total_token_num": 6000, "splitfuse_mode": True, "splitfuse_block_size": 2048}, 2048),
        ({"splitfuse_mode": True}, 8192),
        ({"splitfuse_mode": True, "splitfuse_block_size": 9000}, 9000),
        ({"splitfuse_mode": True, "batch_max_tokens": 256}, 256),
    ],
)
def test_batch_max_tokens_follows_the_documented_formula(flags: dict[str, Any], expected: int) -> None:
    assert made(flags).batch_max_tokens == expected


def test_eos_falls_back_to_2_where_the_model_names_none() -> None:
    plan = made(eos_ids=[])
    assert plan.eos_id == [2]
    assert reason(plan, "eos_id") == "the model names none"


def test_the_context_is_told_when_less_of_it_is_served() -> None:
    assert "context 3072 of the model's 8192" in reason(made(), "context")
    assert all(derived.name != "context" for derived in made({"max_req_total_len": 8192}).derived)


def test_the_model_is_named_after_its_file_or_folder() -> None:
    assert made(path="/a/b/Model-Q4.gguf", format="gguf").model_name == "Model-Q4"
    assert made(path="/a/b/model.v1").model_name == "model.v1"


# --- what is refused -------------------------------------------------------------------------------------------------


def test_no_prompt_is_cached_whose_keys_depend_on_its_length() -> None:
    stretched = {"max_position_embeddings": 8192, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    facts = {"hf_config": SMOLLM2 | stretched, "context_length": 32768}
    long = {"use_dynamic_prompt_cache": True, "max_req_total_len": 8193}
    (problem,) = refused(long, **facts)
    assert problem.key == "use_dynamic_prompt_cache"
    assert "max_req_total_len = 8192" in problem.message
    made(long | {"max_req_total_len": 8192}, **facts)
    made(long | {"use_dynamic_prompt_cache": False}, **facts)


def test_more_than_the_models_context_is_refused() -> None:
    (problem,) = refused(context_length=2048)
    assert (problem.key, problem.file, problem.line) == ("max_req_total_len", FILE, None)
    assert "context of 2048" in problem.message


def test_an_eos_id_beyond_the_vocabulary_is_refused() -> None:
    (problem,) = refused({"eos_id": [2, 49152]})
    assert "49152 is not in the model's vocabulary of 49152 tokens" in problem.message


def test_slots_that_dont_fit_are_refused_with_the_number_that_would() -> None:
    (problem,) = refused({"max_total_token_num": 10_000_000})
    assert problem.key == "max_total_token_num"
    most = int(problem.message.split("at most max_total_token_num = ")[1].split(" ")[0])
    assert most < 10_000_000
    assert made({"max_total_token_num": most}).max_total_token_num == most
    refused({"max_total_token_num": most + 1})


def test_a_longest_request_that_doesnt_fit_is_refused_with_the_length_that_would() -> None:
    device = small(1_860_000_000)
    (problem,) = refused({"max_req_total_len": 8000, "max_req_input_len": 100}, device)
    most = int(problem.message.split("at most max_req_total_len = ")[1].split(" ")[0])
    assert 0 < most < 8000
    assert made({"max_req_total_len": most, "max_req_input_len": 100}, device).max_total_token_num >= most


def test_weights_that_dont_fit_are_told_with_what_they_need() -> None:
    (problem,) = refused(device=small(500_000_000))
    assert problem.key == "model_dir"
    assert "weights 326 MB" in problem.message
    assert "\n" not in problem.message


def test_problems_stand_where_the_key_was_written(tmp_path: Any) -> None:
    file = tmp_path / "a.toml"
    file.write_text('model_dir = "m"\n\nmax_req_total_len = 9000\n')
    with pytest.raises(ConfigInvalid) as raised:
        resolve(load(str(file)), Facts(MODEL, CPU), str(file))
    (problem,) = raised.value.problems
    assert (problem.file, problem.line) == (str(file), 3)
    (moved,) = located([Problem("model_dir", "is gone")], load(str(file)), str(file))
    assert (moved.file, moved.line, moved.message) == (str(file), 1, "is gone")
    (flag,) = located([Problem("model_dir", "is gone")], load(str(file), {"model_dir": "x"}), str(file))
    assert str(flag).startswith("command line: ")


def test_random_weights_need_no_tokenizer() -> None:
    plan = made({"load_way": "DUMMY"}, format="dummy", has_tokenizer=False)
    assert reason(plan, "tokenizer_mode") == "no tokenizer files: text is token ids in decimal"
    assert "random weights" in report(plan)


# --- slots and budget -----------------------------------------------------------------------------------------------


def test_a_gpu_is_filled() -> None:
    plan = made(device=GPU)
    slot = plan.max_total_token_num
    assert plan.budget.needed <= plan.budget.available < plan.budget.needed + 10**6 or slot == 1000 * 3072 + 1
    bigger = made({"running_max_req_size": 10_000}, device=GPU)
    assert bigger.budget.needed <= bigger.budget.available < bigger.budget.needed + 10**6


def test_no_more_slots_than_could_ever_be_used() -> None:
    plan = made({"running_max_req_size": 4}, device=GPU)
    assert plan.max_total_token_num == 4 * 3072 + 1
    assert "never be used" in reason(plan, "max_total_token_num")


def test_a_cpu_is_not_filled_unasked() -> None:
    plan = made()
    kv = next(row.bytes for row in plan.budget.rows if row.name == "kv cache")
    assert kv <= budget.CPU_KV_CAP
    assert "max_total_token_num = N" in reason(plan, "max_total_token_num")
    assert made({"max_total_token_num": 400_000}).max_total_token_num == 400_000


def test_the_cap_leaves_room_for_one_longest_request() -> None:
    wide = SMOLLM2 | {"num_hidden_layers": 200, "num_key_value_heads": 9, "num_attention_heads": 9}
    plan = made({"max_req_total_len": 8192}, device=GPU_SIZED_CPU, hf_config=wide)
    assert plan.max_total_token_num == 8193


GPU_SIZED_CPU = msgspec.structs.replace(CPU, memory_free=78 * 10**9)


def test_the_table_adds_up_and_names_its_rows() -> None:
    plan = made()
    assert [row.name for row in plan.budget.rows] == [
        "weights",
        "kv cache",
        "attention",
        "activations",
        "logits",
        "embeddings",
        "tables",
        "prefix masks",
        "short rows",
        "graphs",
        "runtime",
        "margin",
    ]
    assert plan.budget.needed == sum(row.bytes for row in plan.budget.rows)
    weights = plan.budget.rows[0]
    assert weights.bytes == (134_515_008 + 49152 * 576) * 2
    assert plan.budget.rows[1].bytes == plan.max_total_token_num * 30 * 2 * 3 * 64 * 2
    text = budget_table(plan)
    assert all(row.name in text for row in plan.budget.rows)
    assert "total" in text
    assert "context 3072 of the model's 8192" in report(plan)
    assert text in report(plan)


@settings(deadline=None)
@given(
    free=st.integers(0, 10**12),
    fraction=st.floats(0.01, 1),
    running=st.integers(1, 65536),
    total=st.integers(2, 8192),
    kind=st.sampled_from(["cpu", "cuda"]),
    slots=st.one_of(st.just("auto"), st.integers(8192, 2**31 - 1)),
)
def test_a_plan_always_fits_and_serves_the_longest_request(
    free: int, fraction: float, running: int, total: int, kind: str, slots: int | str
) -> None:
    flags = {
        "max_req_total_len": total,
        "max_req_input_len": total - 1,
        "running_max_req_size": running,
        "engine.memory_fraction": fraction,
        "max_total_token_num": slots,
    }
    device = msgspec.structs.replace(CPU if kind == "cpu" else GPU, memory_free=free)
    try:
        plan = made(flags, device)
    except ConfigInvalid:
        return
    assert plan.budget.needed <= plan.budget.available
    assert plan.max_total_token_num > total or plan.max_total_token_num == slots
    assert plan.batch_max_tokens >= total


# --- the fake engine -------------------------------------------------------------------------------------------


def test_the_fake_engine_has_sensible_values_without_a_model() -> None:
    plan = made({"engine.backend": "fake"}, model=None)
    assert (plan.max_total_token_num, plan.batch_max_tokens, plan.eos_id) == (6000, 8192, [256])
    assert (plan.vocab_size, plan.tokenizer_mode, plan.log_stats_interval) == (257, "fast", 10.0)
    assert plan.model is None
    assert report(plan)
    long = made({"engine.backend": "fake", "max_req_total_len": 9000}, model=None)
    assert long.max_total_token_num == 9001
    written = made({"engine.backend": "fake", "max_total_token_num": 4000, "eos_id": [3]}, model=None)
    assert (written.max_total_token_num, written.batch_max_tokens, written.eos_id) == (4000, 3072, [3])


# --- models that score ------------------------------------------------------------------------------------------------

REWARD = SMOLLM2 | {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "bad", "1": "good"}}
STEPS = SMOLLM2 | {"architectures": ["Qwen2ForProcessRewardModel"], "model_type": "qwen2", "vocab_size": 151_665}


def test_what_a_model_scores_is_in_the_plan() -> None:
    plan = made({"use_reward_model": True}, hf_config=REWARD | {"problem_type": "regression"})
    assert decode_plan(encode_plan(plan)).scoring == Scoring(["bad", "good"], "regression")
    assert made().scoring is None


@pytest.mark.parametrize(("config", "switch"), [(REWARD, False), (SMOLLM2, True)])
def test_the_other_kind_of_model_is_refused_by_name(config: dict[str, Any], switch: bool) -> None:
    (problem,) = refused({"use_reward_model": switch}, hf_config=config)
    assert "use_reward_model = true" in problem.message
    assert config["architectures"][0] in problem.message


@pytest.mark.parametrize(
    ("facts", "marker"),
    [({"step_token": 77}, 77), ({"has_tokenizer": False}, 151_651), ({"has_tokenizer": True}, None)],
)
def test_steps_are_read_at_the_tokenizers_own_token(facts: dict[str, Any], marker: int | None) -> None:
    flags = {"use_reward_model": True}
    if marker is None:
        (problem,) = refused(flags, hf_config=STEPS, model_type="qwen2", **facts)
        assert "<extra_0>" in problem.message
    else:
        assert made(flags, hf_config=STEPS, model_type="qwen2", **facts).scoring.marker == marker


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_model_that_scores_has_room_for_its_head_and_none_for_logits(device: DeviceFacts) -> None:
    generates = {row.name: row.bytes for row in made(device=device).budget.rows}
    flags = {"use_reward_model": True}
    scores = {row.name: row.bytes for row in made(flags, device, hf_config=REWARD).budget.rows}
    assert "logits" in generates
    assert "logits" not in scores
    assert scores["scores"] >= 4 * 2 * 576
    inner = made(flags, device, hf_config=STEPS, model_type="qwen2", step_token=1).budget.row("scores")
    assert inner >= 4 * (576 * 576 + 2 * 576)
