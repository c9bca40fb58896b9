"""What the plan makes of a model that transformers computes: memory, heads on a GPU, how long a request may be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightllmd.architecture.outline import Outline
from lightllmd.architecture.spec import GroupedQuery
from lightllmd.config.load import load
from lightllmd.config.plan import DeviceFacts, Facts, ModelFacts, Plan, decode_plan, encode_plan
from lightllmd.config.resolve import resolve
from lightllmd.errors import ConfigInvalid
from resolved import PHI2

CPU = DeviceFacts("cpu", "a CPU", 1, 64_000_000_000, 60_000_000_000, ["bfloat16", "float32"], 8)
H100 = DeviceFacts("cuda", "NVIDIA H100", 1, 85_520_809_984, 84_900_000_000, ["bfloat16", "float16", "float32"], 16)
TOTAL = {"max_req_total_len": 2048, "max_req_input_len": 1024, "batch_max_tokens": 4096}


def planned(outline: Outline, device: DeviceFacts, **flags: object) -> Plan:
    model = ModelFacts(
        "/m", "dummy", "phi", {}, [], 0, 0, "bfloat16", outline.context, [2], False, False, outline=outline
    )
    return resolve(load(None, {"model_dir": "m", "load_way": "DUMMY", **TOTAL, **flags}), Facts(model, device))


def test_weights_and_steps_are_what_the_run_without_weights_showed() -> None:
    plan = planned(PHI2, CPU)
    assert plan.budget.row("weights") == 2_780_000_000 * 2 + 1000
    qkv = 7 * 32 * 80 * 2  # padded queries, keys, values and what attention makes of them
    assert plan.budget.row("activations") == 5000 + 4096 * (40_000 + qkv)
    assert plan.budget.row("kv cache") == plan.max_total_token_num * 32 * 2 * 32 * 80 * 2
    backend = next(one for one in plan.derived if one.name == "backend")
    assert backend.value == "transformers"
    assert "PhiForCausalLM" in backend.reason
    assert decode_plan(encode_plan(plan)) == plan


def test_heads_are_padded_to_what_a_gpu_has_kernels_for_and_the_cache_pays_for_it() -> None:
    plan = planned(PHI2, H100)
    assert plan.budget.row("kv cache") == (plan.max_total_token_num + 1) * 32 * 2 * 32 * 128 * 2
    assert plan.budget.row("graphs") == 0
    assert [each.head_dim for each in PHI2.padded([16, 32]).attention] == [80] * 32


def test_layers_with_heads_of_several_shapes_are_refused_on_a_gpu_alone() -> None:
    other = replace(PHI2, attention=(*PHI2.attention[1:], GroupedQuery(32, 8, 80, 0.1)))
    planned(other, CPU)
    with pytest.raises(ConfigInvalid, match="heads of different shapes"):
        planned(other, H100)


def test_a_request_is_no_longer_than_rotary_angles_are_of_its_tokens_alone() -> None:
    stretched = replace(PHI2, longest=1024)
    with pytest.raises(ConfigInvalid, match="max_req_total_len = 1024 or less works"):
        planned(stretched, CPU)
    planned(stretched, CPU, max_req_total_len=1024, max_req_input_len=512)
