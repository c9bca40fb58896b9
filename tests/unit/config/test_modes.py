"""`mode`: each documented name means what LightLLM's does, on a GPU and on a CPU, or is refused by name."""

from __future__ import annotations

import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lightllmd.architecture.schemes import scheme_of
from lightllmd.architecture.weight_schemes import ALL_DENSE, WeightSchemes
from lightllmd.config.load import load
from lightllmd.config.modes import ALIASES, GROUPS, MODES, REFUSED
from lightllmd.config.plan import Plan
from lightllmd.config.reference import mode_table
from lightllmd.config.report import report
from lightllmd.errors import ConfigInvalid
from resolved import CPU, GPU, MODEL, PHI2, architecture_of, made, reason, refused

README = Path(__file__).parents[3] / "README.md"
TRANSFORMERS = {"hf_config": {}, "outline": PHI2, "context_length": 2048}
SHORT = {"max_req_total_len": 2048, "max_req_input_len": 1024}
QUANTISED = ("qkv", "attention_out", "gate_up", "down")
# The parameter page's names, and what LightLLM accepts beside them.
PAGE = """
triton_int8kv ppl_int8kv ppl_fp16 triton_flashdecoding triton_gqa_attention triton_gqa_flashdecoding triton_w4a16
lmdeploy_w4a16 ppl_w4a16 triton_w8a16 triton_w8a8 ppl_w8a8 ppl_w8a8_mixdown
ppl_int8kv_flashdecoding ppl_int4kv_flashdecoding ppl_fp16_flashdecoding flash_llm_w6a16 quik_activation_weight
"""
OURS = ["fp8kv", "int4kv", "fp8", "fp8_block"]

# role -> scheme, in all layers
WEIGHTS = {
    "triton_w4a16": dict.fromkeys(QUANTISED, "w4a16 g128"),
    "lmdeploy_w4a16": dict.fromkeys(QUANTISED, "w4a16 g128"),
    "ppl_w4a16": dict.fromkeys(QUANTISED, "w4a16 g128"),
    "triton_w8a16": dict.fromkeys(QUANTISED, "w8a16"),
    "triton_w8a8": dict.fromkeys(QUANTISED, "w8a8"),
    "ppl_w8a8": {**dict.fromkeys(QUANTISED, "w8a8"), "attention_out": "dense"},
    "ppl_w8a8_mixdown": {**dict.fromkeys(QUANTISED, "w8a8"), "attention_out": "dense", "down": "dense"},
    "fp8": dict.fromkeys(QUANTISED, "fp8"),
    "fp8_block": dict.fromkeys(QUANTISED, "fp8_block"),
}
KV = {
    "triton_int8kv": "int8",
    "ppl_int8kv": "int8_group8",
    "ppl_int8kv_flashdecoding": "int8_group8",
    "ppl_int4kv_flashdecoding": "int4_group8",
    "int4kv": "int4",
    "fp8kv": "fp8",
}
DECODE = {
    "triton_flashdecoding": "triton_flashdecoding",
    "triton_gqa_attention": "triton_gqa_attention",
    "triton_gqa_flashdecoding": "triton_gqa_flashdecoding",
    "ppl_fp16": "ppl_fp16",
    "ppl_fp16_flashdecoding": "ppl_fp16",
}


def stored(plan: Plan) -> dict[str, set[str]]:
    """Titles of the schemes of each role's weights."""
    found: dict[str, set[str]] = {}
    for weight in architecture_of(plan).weights:
        found.setdefault(weight.role, set()).add(plan.schemes.of(weight).title)
    return found


def test_every_name_of_the_page_is_known() -> None:
    assert sorted([*MODES, *REFUSED]) == sorted([*PAGE.split(), *OURS])
    assert sorted([*WEIGHTS, *KV, *DECODE]) == sorted(MODES)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_mode_stores_these_weights_so_and_no_others(name: str) -> None:
    for device in (CPU, GPU):
        plan = made({"mode": [name]}, device)
        found = stored(plan)
        assert {role: found.pop(role) for role in QUANTISED} == {role: {how} for role, how in WEIGHTS[name].items()}
        assert set().union(*found.values()) == {"dense"}
        assert (plan.kv_scheme, plan.decode_kernel, plan.warnings) == ("dense", "auto", [])
        assert f"mode {name}" in reason(plan, "weights")


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_an_alias_is_the_mode_that_it_names(alias: str, name: str) -> None:
    assert made({"mode": [alias]}).schemes == made({"mode": [name]}).schemes != ALL_DENSE
    assert made({"mode": [alias, name, alias]}).schemes == made({"mode": [name]}).schemes


@pytest.mark.parametrize("group", GROUPS)
def test_the_groups_of_4_bit_weights_have_the_size_that_is_asked_for(group: int) -> None:
    for names in ([f"g{group}", "triton_w4a16"], ["ppl_int4weight", f"g{group}"]):
        assert stored(made({"mode": names}))["down"] == {f"w4a16 g{group}"}


@pytest.mark.parametrize("name", KV)
def test_a_cache_mode_says_how_the_cache_is_stored(name: str) -> None:
    plan = made({"mode": [name, "triton_w8a16"]})
    assert (plan.kv_scheme, plan.decode_kernel, plan.warnings) == (KV[name], "auto", [])
    assert stored(plan)["down"] == {"w8a16"}
    assert f"mode {name}" in reason(plan, "kv cache")
    assert plan.max_total_token_num > 1.5 * made().max_total_token_num


@pytest.mark.parametrize("name", DECODE)
def test_a_decode_kernel_of_a_gpu_is_said_to_be_none_on_a_cpu(name: str) -> None:
    plan = made({"mode": [name, "triton_w4a16"]}, GPU)
    assert (plan.decode_kernel, plan.kv_scheme, plan.warnings) == (DECODE[name], "dense", [])
    assert "warning" not in report(plan)
    here = made({"mode": [name]}, CPU)
    (warning,) = here.warnings
    assert warning.startswith(f"mode {name} names a decode kernel of a GPU; {CPU.name} takes its own")
    assert f"warning: {warning}" in report(here)


@pytest.mark.parametrize("name", ["ppl_fp16", "ppl_fp16_flashdecoding", "triton_w8a8"])
def test_what_computes_in_float16_does_so_unasked_and_in_nothing_else_that_is_asked(name: str) -> None:
    plan = made({"mode": [name]}, GPU)
    assert plan.data_type == "float16"
    assert f"mode {name}" in reason(plan, "data_type")
    # One file serves both; this CPU is ten times as slow in float16.
    here = made({"mode": [name]}, CPU)
    assert here.data_type == "bfloat16"
    assert f"mode {name} computes in float16 on a GPU" in reason(here, "data_type")
    for device in (CPU, GPU):
        assert made({"mode": [name], "data_type": "fp16"}, device).data_type == "float16"


@pytest.mark.parametrize("name", ["ppl_w8a8", "ppl_w8a8_mixdown", "triton_w8a16", "fp8", "triton_gqa_attention"])
def test_the_others_compute_in_the_models_own_data_type(name: str) -> None:
    assert made({"mode": [name]}, GPU).data_type == "bfloat16"


def test_the_models_own_mixdown_names_the_layers_whose_down_stays_as_it_is() -> None:
    plan = made({"mode": ["ppl_w8a8_mixdown"]}, hf_config={**MODEL.hf_config, "mixdown": [0, 3]})
    down = [weight for weight in architecture_of(plan).weights if weight.role == "down"]
    assert [weight.layer for weight in down if plan.schemes.of(weight).dense] == [0, 3]


@pytest.mark.parametrize("written", [[30], [-1], ["0"], "all", [True]])
def test_a_mixdown_of_no_layers_is_refused(written: object) -> None:
    (problem,) = refused({"mode": ["ppl_w8a8_mixdown"]}, hf_config={**MODEL.hf_config, "mixdown": written})
    assert problem.key == "model_dir"
    assert "a list of layers from 0 to 29 is needed" in problem.message


def test_layers_and_matrices_are_stored_as_the_last_rule_says() -> None:
    rules = ["all: w4a16 g64", "0-3, 29: w8a16", "down attention_out 28-29: dense"]
    plan = made({"quantise.rules": rules})
    found = {weight.key: plan.schemes.of(weight).title for weight in architecture_of(plan).weights}
    assert [found["0.down"], found["3.qkv"], found["29.gate_up"]] == ["w8a16"] * 3
    assert [found["4.down"], found["28.qkv"]] == ["w4a16 g64"] * 2
    assert [found["28.down"], found["29.attention_out"], found["embed"], found["norm"]] == ["dense"] * 4
    (row,) = [row for row in plan.budget.rows if row.name == "weights"]
    assert " of them as w8a16" in row.how
    assert " as w4a16 g64" in row.how
    # A mode is as a rule before them.
    mode = made({"mode": ["ppl_w8a8"], "quantise.rules": ["attention_out: fp8"]})
    assert stored(mode)["attention_out"] == {"fp8"}
    assert stored(mode)["down"] == {"w8a8"}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("w4a16", "is not of the form WHERE: SCHEME"),
        ("all:", "is not of the form"),
        (": w4a16", "is not of the form"),
        ("all 0-3: w4a16", '"all" is no matrix'),
        ("o_proj: w4a16", '"o_proj" is no matrix (qkv, attention_out, gate_up, down)'),
        ("-1: w4a16", '"-1" is no matrix'),
        ("3-1: w4a16", "3-1 ends before it begins"),
        ("all: triton_w4a16", '"triton_w4a16" is no scheme; known: dense, w8a16'),
        ("all: w4a16 64", "behind a scheme stands gN or nothing"),
        ("all: w4a16 g48", "has 16, 32, 64, 128, 256, 512 or 1024 inputs"),
        ("all: w8a16 g64", "w8a16 has no groups"),
    ],
)
def test_a_rule_that_says_nothing_is_refused(rule: str, message: str) -> None:
    with pytest.raises(ConfigInvalid) as raised:
        load(None, {"model_dir": "m", "quantise.rules": ["0: dense", rule]})
    (problem,) = raised.value.problems
    assert problem.key == "quantise.rules"
    assert message in problem.message


@pytest.mark.parametrize("layers", ["30", "2, 28-999999999"])
def test_layers_that_the_model_does_not_have_are_refused_by_the_plan(layers: str) -> None:
    (problem,) = refused({"quantise.rules": [f"down {layers}: w8a16"]})
    assert problem.key == "quantise.rules"
    assert "/models/smollm2 has layers 0 to 29" in problem.message
    (problem,) = refused({"mode": ["ppl_w8a8_mixdown"], "quantise.mixdown": layers})
    assert problem.key == "quantise.mixdown"
    assert "/models/smollm2 has layers 0 to 29" in problem.message


def test_a_written_mixdown_stands_over_the_models_own() -> None:
    for own in ([1], "all", [99]):
        facts = {"hf_config": {**MODEL.hf_config, "mixdown": own}}
        plan = made({"mode": ["ppl_w8a8_mixdown"], "quantise.mixdown": "0-2,29"}, **facts)
        down = [weight for weight in architecture_of(plan).weights if weight.role == "down"]
        assert [weight.layer for weight in down if plan.schemes.of(weight).dense] == [0, 1, 2, 29]


@pytest.mark.parametrize("flags", [{"mode": ["triton_w8a16"]}, {"quantise.rules": ["all: w8a16"]}])
def test_a_model_of_transformers_takes_cache_modes_alone(flags: dict[str, Any]) -> None:
    (problem,) = refused({**flags, **SHORT}, **TRANSFORMERS)
    assert problem.key in flags
    assert f"{PHI2.architecture} is computed by transformers' modules" in problem.message
    assert "triton_int8kv" in problem.message
    assert made({"mode": ["triton_int8kv"], **SHORT}, **TRANSFORMERS).kv_scheme == "int8"


def test_a_quantised_checkpoint_takes_the_mode_that_it_is_in_already_and_no_other() -> None:
    four_bits = WeightSchemes.all(replace(scheme_of("w4a16"), scales="float16"))
    facts = {"schemes": four_bits, "quantised_as": "AWQ, 4 bits in groups of 128"}
    for flags in ({}, {"mode": ["ppl_int4weight"]}, {"quantise.rules": ["all: w4a16"]}):
        assert made(flags, **facts).schemes == four_bits
    for flags in ({"mode": ["triton_w4a16", "g64"]}, {"mode": ["triton_w8a16"]}, {"quantise.rules": ["0: w8a16"]}):
        (problem,) = refused(flags, **facts)
        assert "are stored already, as AWQ, 4 bits in groups of 128" in problem.message


def test_a_gpu_that_multiplies_no_float8_is_told_what_it_can() -> None:
    for capability, nearest in (((8, 6), "triton_w8a8"), ((7, 5), "triton_w8a16")):
        old = msgspec.structs.replace(GPU, name="Old GPU", capability=capability)
        for mode in ("fp8", "fp8_block"):
            [problem] = refused({"mode": [mode]}, old)
            has = ".".join(map(str, capability))
            expected = (
                f"stored as {mode} need a GPU of compute capability 8.9 or higher, Old GPU has {has}; mode {nearest}"
            )
            assert expected in problem.message
        made({"mode": [nearest]}, old)
    for device in (CPU, GPU, msgspec.structs.replace(GPU, capability=(8, 9))):
        made({"mode": ["fp8"]}, device)


def test_layers_beyond_number_are_refused_on_every_device_without_listing_them() -> None:
    limit, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 28), hard))  # a list of them would take gigabytes
    try:
        for device in (CPU, GPU, msgspec.structs.replace(GPU, capability=(9, 0))):
            [problem] = refused({"quantise.rules": ["0-999999999: w8a16"]}, device)
            assert "names layer 999999999" in problem.message
            [problem] = refused({"mode": ["ppl_w8a8_mixdown"], "quantise.mixdown": "0-999999999"}, device)
            assert "names layer 999999999" in problem.message
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def test_the_budget_says_how_much_is_stored_by_which_scheme() -> None:
    plan = made({"mode": ["triton_w4a16"]})
    (row,) = [row for row in plan.budget.rows if row.name == "weights"]
    assert row.how.startswith("134.5 M parameters in bfloat16, 106.2 M of them as w4a16 g128")
    assert "w4a16 g128" in report(plan)


def test_a_step_with_rounded_inputs_takes_room_for_them() -> None:
    plan = made({"mode": ["triton_w8a8"]}, GPU)
    tokens = plan.batch_max_tokens + plan.config.params.running_max_req_size
    assert plan.budget.row("quantised inputs") == tokens * (1536 + 4)  # down has the most inputs
    assert made({"mode": ["fp8_block"]}, GPU).budget.row("quantised inputs") == tokens * (1536 + 4 * 12)
    assert made({"mode": ["ppl_w8a8_mixdown"]}, GPU).budget.row("quantised inputs") == tokens * (576 + 4)
    assert made({"mode": ["fp8"]}).budget.row("quantised inputs") > plan.batch_max_tokens * 1536 * 4
    for names in ([], ["triton_w4a16"]):
        assert made({"mode": names}, GPU).budget.row("quantised inputs") == 0


def test_the_table_in_the_readme_is_what_is_generated() -> None:
    """With LIGHTLLMD_WRITE_TABLES=1 it is written there."""
    begin, end = "<!-- table of modes -->\n", "\n<!-- end -->"
    before, _, rest = README.read_text(encoding="utf-8").partition(begin)
    written, _, after = rest.partition(end)
    if os.environ.get("LIGHTLLMD_WRITE_TABLES") == "1":
        README.write_text(f"{before}{begin}{mode_table()}{end}{after}", encoding="utf-8")
    else:
        assert written == mode_table(), "LIGHTLLMD_WRITE_TABLES=1 writes it"
