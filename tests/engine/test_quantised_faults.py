"""Quantised checkpoints that are damaged, or that nothing here computes, are refused by file, tensor and name before
anything is loaded; what tools write differently from each other is understood."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightllmd.architecture.cpu_storage import cpu_nbytes
from lightllmd.architecture.storage import weight_bytes
from lightllmd.config.parameters import Config, Params
from lightllmd.config.plan import DeviceFacts, Facts, Plan
from lightllmd.config.resolve import resolve
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.errors import ConfigInvalid, WeightsInvalid
from lightllmd.probe.model import model_facts
from lightllmd.weights import place, staged
from lightllmd.weights.quantised.formats import quantisation_of
from lightllmd.weights.quantised.stored import matrices_of
from lightllmd.weights.safetensors import SafetensorsCheckpoint
from quantised_checkpoints import (
    Case,
    awq,
    float_quantized,
    gptq,
    int_quantized,
    pack_quantized,
    planned,
    write_quantised,
)
from tiny_models import DEVICE, Driver, load, write_tensors

IDS = [3, 14, 15, 92, 65]
Change = Callable[[dict[str, Tensor]], object]
Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}


def of_groups(form: str, weights: dict[str, Any], inputs: Any = None, **more: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": groups,
        "ignore": ["lm_head"],
        **more,
    }


def of_tensor(dynamic: bool) -> dict[str, Any]:
    return {"num_bits": 8, "type": "int", "strategy": "token" if dynamic else "tensor", "dynamic": dynamic}


def changed(folder: Path, change: Change) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    write_tensors(folder, {name: tensor.contiguous() for name, tensor in tensors.items()})
    return folder


def logits(folder: Path) -> Tensor:
    runner = CpuRunner()
    runner.load(planned(folder), lambda done, total: None)
    driver = Driver(runner)
    return driver.logits(driver.row(0, IDS))[0]


def dense_logits(folder: Path) -> Tensor:
    driver = Driver(load(folder))
    return driver.logits(driver.row(0, IDS))[0]


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max().item() < 2e-4 * theirs.abs().max().item()


# --- damage -------------------------------------------------------------------------------------------------------

DAMAGE: dict[str, tuple[Case, Change, list[str]]] = {
    "values gone": (Case(GPTQ, gptq()), lambda held: held.pop(f"{Q}.qweight"), [f"{Q}.qweight is missing", "[8, 64]"]),
    "scales gone": (Case(AWQ, awq()), lambda held: held.pop(f"{DOWN}.scales"), [f"{DOWN}.scales is missing"]),
    "a matrix gone": (
        Case(GPTQ, gptq()),
        lambda held: [held.pop(f"{Q}.{end}") for end in ("qweight", "qzeros", "scales", "g_idx")],
        [f"{Q}.qweight (and 2 more) is missing"],
    ),
    "an order gone": (
        Case({**GPTQ, "desc_act": True}, gptq(shuffled=True)),
        lambda held: held.pop(f"{Q}.g_idx"),
        [f"{Q}.g_idx is missing", "[64]"],
    ),
    "of another group": (
        Case({**GPTQ, "group_size": 64}, gptq()),
        lambda held: None,
        ["qzeros has shape [2, 8]", "[1, 8]"],
    ),
    "packed the other way": (
        Case(AWQ, awq()),
        lambda held: held.update({f"{Q}.qweight": held[f"{Q}.qweight"].t()}),
        [f"{Q}.qweight has shape [8, 64], config and quantisation say [64, 8]"],
    ),
    "values of another type": (
        Case(AWQ, awq()),
        lambda held: held.update({f"{Q}.qweight": held[f"{Q}.qweight"].float()}),
        [f"{Q}.qweight is of type F32", "I32"],
    ),
    "scales that are integers": (
        Case(GPTQ, gptq()),
        lambda held: held.update({f"{Q}.scales": held[f"{Q}.scales"].int()}),
        [f"{Q}.scales is of type I32"],
    ),
    "whole and quantised at once": (
        Case(GPTQ, gptq()),
        lambda held: held.update({f"{Q}.weight": torch.ones(64, 64)}),
        [f"{Q}.weight [64, 64] is in the checkpoint, but the config has no place for it"],
    ),
    "a bias that counts": (
        Case(GPTQ, gptq()),
        lambda held: held.update({f"{Q}.bias": torch.ones(64)}),
        [f"{Q}.bias [64] is in the checkpoint"],
    ),
    "scales of float8 gone": (
        Case({**FP8, "weight_block_size": [128, 128]}, float_quantized("block", scale="weight_scale_inv")),
        lambda held: held.pop(f"{Q}.weight_scale_inv"),
        [f"{Q}.weight_scale_inv is missing"],
    ),
    "whole with scales": (
        Case(FP8, float_quantized("tensor")),
        lambda held: held.update({f"{Q}.weight": torch.ones(64, 64)}),
        [f"{Q}.weight is of type F32", "F8_E4M3"],
    ),
    "an input's scale gone": (
        Case({**FP8, "activation_scheme": "static"}, float_quantized("tensor", "static")),
        lambda held: held.pop(f"{Q}.input_scale"),
        [f"{Q}.input_scale is missing"],
    ),
    "zeros gone": (
        Case(of_groups("pack-quantized", INT4), pack_quantized(symmetric=False)),
        lambda held: held.pop(f"{Q}.weight_zero_point"),
        [f"{Q}.weight_zero_point is missing"],
    ),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_what_does_not_fit_is_told_by_file_and_tensor(fault: str, tmp_path: Path) -> None:
    case, change, words = DAMAGE[fault]
    folder, _, _ = write_quantised(tmp_path, case)
    changed(folder, change)
    with pytest.raises(WeightsInvalid) as refused:
        model_facts(str(folder))
    assert all(word in str(refused.value) for word in [str(folder), *words]), refused.value


CONTENTS: dict[str, tuple[Case, Change, str]] = {
    "a group that is none": (
        Case({**GPTQ, "desc_act": True}, gptq(shuffled=True)),
        lambda held: held[f"{DOWN}.g_idx"].fill_(7),
        rf"model\.safetensors: tensor {DOWN}\.g_idx does not have each group from 0 to 2 for 32 inputs",
    ),
    "a group below all": (
        Case({**GPTQ, "desc_act": True}, gptq(shuffled=True)),
        lambda held: held[f"{DOWN}.g_idx"].__setitem__(0, -5),
        rf"{DOWN}\.g_idx does not have each group",
    ),
    "zeros of what is symmetric": (
        Case({**GPTQ, "bits": 8}, gptq(8, symmetric=False)),
        lambda held: None,
        r"qzeros has zeros other than 128, the quantisation says sym = true",
    ),
    "another shape than its own": (
        Case(of_groups("pack-quantized", INT4), pack_quantized(symmetric=False)),
        lambda held: held[f"{DOWN}.weight_shape"].fill_(9),
        rf"{DOWN}\.weight_shape says \[9, 9\], the config says \[64, 96\]",
    ),
    "a scale of inputs that is none": (
        Case(of_groups("int-quantized", INT8, of_tensor(False)), int_quantized(inputs="static")),
        lambda held: held[f"{DOWN}.input_scale"].fill_(0),
        rf"{DOWN}\.input_scale is 0, a positive number is needed",
    ),
    "inputs with a zero": (
        Case(of_groups("int-quantized", INT8, of_tensor(False)), int_quantized(inputs="static")),
        lambda held: held.update({f"{DOWN}.input_zero_point": torch.tensor([3], dtype=torch.int8)}),
        rf"{DOWN}\.input_zero_point is not 0",
    ),
    "weights with a zero": (
        Case(of_groups("int-quantized", INT8, of_tensor(True)), int_quantized()),
        lambda held: held.update({f"{DOWN}.weight_zero_point": torch.ones(64, 1, dtype=torch.int8)}),
        rf"{DOWN}\.weight_zero_point has zeros other than 0",
    ),
    "scales that are no numbers": (
        Case(AWQ, awq()),
        lambda held: held[f"{DOWN}.scales"].fill_(float("nan")),
        r"scales of weight 0\.down are no numbers",
    ),
}


@pytest.mark.parametrize("fault", CONTENTS)
def test_contents_that_contradict_the_format_are_told_while_loading(fault: str, tmp_path: Path) -> None:
    case, change, words = CONTENTS[fault]
    folder, _, _ = write_quantised(tmp_path, case)
    plan = planned(changed(folder, change))
    with pytest.raises(WeightsInvalid, match=words):
        CpuRunner().load(plan, lambda done, total: None)


# --- settings -----------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 'of quant_method "bitsandbytes"'),
    "bitsandbytes without its name": ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, '"bitsandbytes"'),
    **{
        name: ({"quant_method": name}, f'quantised checkpoints of quant_method "{name}" are not available; AWQ')
        for name in ("hqq", "aqlm", "mxfp4", "quanto", "torchao", "eetq", "fbgemm_fp8", "auto-round", "spqr", "vptq")
    },
    "no name": ({"bits": 4}, "that name no quant_method"),
    "GPTQ of 3 bits": ({**GPTQ, "bits": 3}, "GPTQ checkpoints of 3 bits are not available; of 4 and 8 bits are"),
    "GPTQ of 2 bits in a rule": ({**GPTQ, "dynamic": {"+:.*up_proj": {"bits": 2}}}, "of 2 bits are not available"),
    "GPTQ for marlin": ({**GPTQ, "checkpoint_format": "marlin"}, 'in the layout "marlin" are not available'),
    "a marlin switch": ({**GPTQ, "is_marlin_format": True}, 'in the layout "marlin"'),
    "GPTQ in other words": ({**GPTQ, "pack_dtype": "int16"}, 'pack_dtype is "int16", int32 is available'),
    "a group that is none": ({**GPTQ, "group_size": 20}, "group_size is 20, -1 or a multiple of 8"),
    "bits that are none": ({**GPTQ, "bits": "four"}, 'bits is "four", an integer is needed'),
    "a pattern that is none": ({**GPTQ, "dynamic": {"-:(": {}}}, "is no regular expression"),
    "AWQ gemv": (
        {**AWQ, "version": "gemv"},
        'AWQ checkpoints of version "gemv" are not available; of version gemm are',
    ),
    "AWQ gemv_fast": ({**AWQ, "version": "GEMV_FAST"}, '"gemv_fast" are not available'),
    "AWQ of 3 bits": ({**AWQ, "bits": 3}, "AWQ checkpoints of 3 bits"),
    "FP8 of another kind": ({**FP8, "fmt": "e5m2"}, 'of format "e5m2" are not available; of e4m3'),
    "FP8 with other inputs": ({**FP8, "activation_scheme": "some"}, 'activation_scheme is "some", dynamic or static'),
    "FP8 of no blocks": ({**FP8, "weight_block_size": [128]}, "weight_block_size is [128], two sizes are needed"),
    "static blocks": ({**FP8, "weight_block_size": [8, 8], "activation_scheme": "static"}, "static with weight_block"),
    "NVFP4": (of_groups("nvfp4-pack-quantized", INT4), 'of format "nvfp4-pack-quantized" are not available; pack-'),
    "sparse": (
        of_groups("pack-quantized", INT4, sparsity_config={"format": "sparse-24-bitmask"}),
        'sparse weights ("sparse-24-bitmask")',
    ),
    "rotated": (of_groups("pack-quantized", INT4, transform_config={"config_groups": {"a": {}}}), "rotated weights"),
    "3 bits": (of_groups("pack-quantized", {**INT4, "num_bits": 3}), "packed weights of 3 bits are not available"),
    "4 bits times 8": (of_groups("int-quantized", {**INT8, "num_bits": 4}, of_tensor(True)), "int weights of 4 bits"),
    "float inputs of int weights": (
        of_groups("int-quantized", INT8, {**of_tensor(True), "type": "float"}),
        "input_activations: only symmetric ones",
    ),
    "inputs with zeros": (
        of_groups("int-quantized", INT8, {**of_tensor(True), "symmetric": False}),
        "input_activations: only symmetric ones",
    ),
    "nothing to quantise": (of_groups("pack-quantized", {}), "group_0 has no weights"),
    "ModelOpt's other": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 'quant_algo "nvfp4" are not available'),
    "no object": ([1], "quantization_config is [1], an object is needed"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("fault", REFUSED)
@pytest.mark.parametrize("load_way", ["HF", "DUMMY"])
def test_what_is_not_computed_is_refused_by_name_when_the_plan_is_made(
    fault: str, load_way: str, tmp_path: Path
) -> None:
    settings, words = REFUSED[fault]
    folder, _, _ = write_quantised(tmp_path, Case(settings, awq()))
    with pytest.raises(ConfigInvalid) as refused:
        model_facts(str(folder), load_way=load_way)
    (problem,) = refused.value.problems
    assert problem.key == "model_dir"
    assert problem.message.startswith(f"{folder / 'config.json'}: ")
    assert words in problem.message


@pytest.mark.parametrize("file", ["", "quantize_config.json"])
def test_models_that_transformers_computes_are_refused(file: str, tmp_path: Path) -> None:
    folder, _, _ = write_quantised(tmp_path, Case(GPTQ, gptq(), file=file))
    with pytest.raises(ConfigInvalid, match="quantised checkpoints of models that transformers computes"):
        model_facts(str(folder), backend="transformers")


def test_a_mode_beside_it_can_only_say_the_same(tmp_path: Path) -> None:
    folder, _, _ = write_quantised(tmp_path, Case(GPTQ, gptq()))
    device = DeviceFacts("cpu", "a CPU", 1, 1 << 33, 1 << 33, ["float32", "bfloat16"], 2)
    facts = Facts(model_facts(str(folder)), device)
    limits = {"max_req_input_len": 100, "max_req_total_len": 200}

    def planned_with(*mode: str) -> Plan:
        return resolve(Config(params=Params(model_dir=str(folder), mode=list(mode), **limits)), facts)

    own, named = planned_with(), planned_with("triton_w4a16", "g32")
    assert own.schemes == named.schemes == facts.model.schemes  # type: ignore[union-attr]
    assert own.budget == named.budget
    assert any(one.name == "quantisation" and one.value.startswith("GPTQ, 4 bits") for one in own.derived)
    with pytest.raises(ConfigInvalid, match=r"are stored already, as GPTQ, 4 bits, groups of 32"):
        planned_with("triton_w8a16")


# --- what tools write ---------------------------------------------------------------------------------------------


def test_zeros_of_the_second_format_under_the_name_of_the_first(tmp_path: Path) -> None:
    """GPTQModel 5 (vLLM's pull request 38966): symmetric files say "gptq" and store 8, not 7."""
    folder, dense, _ = write_quantised(tmp_path, Case({**GPTQ, "checkpoint_format": "gptq"}, gptq(less_one=False)))
    close(logits(folder), dense_logits(dense))


@pytest.mark.parametrize("ordered", [False, True])
def test_one_group_for_all_inputs_where_there_is_no_order(ordered: bool, tmp_path: Path) -> None:
    """neural-compressor's pull request 2204: `g_idx` of zeros."""
    folder, dense, _ = write_quantised(tmp_path, Case({**GPTQ, "desc_act": ordered}, gptq()))
    changed(folder, lambda held: [held[name].zero_() for name in held if name.endswith("g_idx")])
    close(logits(folder), dense_logits(dense))


def test_biases_of_zeros_that_the_config_does_not_have(tmp_path: Path) -> None:
    """AutoGPTQ writes them for every linear."""
    folder, dense, _ = write_quantised(tmp_path, Case(GPTQ, gptq()))
    changed(folder, lambda held: held.update({f"{Q}.bias": torch.zeros(64), f"{DOWN}.bias": torch.zeros(64)}))
    close(logits(folder), dense_logits(dense))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_scales_of_other_types(kind: torch.dtype, tmp_path: Path) -> None:
    folder, _, _ = write_quantised(tmp_path, Case(AWQ, awq()))
    before = logits(folder)
    changed(folder, lambda held: held.update({k: v.to(kind) for k, v in held.items() if k.endswith("scales")}))
    difference = (logits(folder) - before).abs().max().item()
    assert difference < (0.1 if kind is torch.bfloat16 else 1e-5) * before.abs().max().item()


def test_a_layer_that_its_settings_do_not_name_as_kept(tmp_path: Path) -> None:
    """AutoAWQ's issue 589: what was left out is not written down."""
    folder, dense, _ = write_quantised(tmp_path, Case(AWQ, awq(), {"layers.0.mlp.down_proj": None}))
    plan = planned(folder)
    close(logits(folder), dense_logits(dense))
    down = [weight for weight in plan.model.architecture.weights if weight.role == "down"]  # type: ignore[union-attr]
    assert [plan.schemes.of(weight).dense for weight in down] == [True, False]


def test_scales_of_the_cache_are_left_and_said(tmp_path: Path) -> None:
    """sglang's pull request 35455: `kv_cache_scheme` and its scales."""
    settings = of_groups("pack-quantized", INT4, kv_cache_scheme={"num_bits": 8, "type": "float"})
    folder, dense, _ = write_quantised(tmp_path, Case(settings, pack_quantized(symmetric=False)))
    scale = {f"model.layers.0.self_attn.{one}_scale": torch.ones(1) for one in "kv"}
    changed(folder, lambda held: held.update(scale))
    close(logits(folder), dense_logits(dense))
    assert any("kv_cache_scheme" in said for said in model_facts(str(folder)).dequantised)


UNLIKE = {
    "groups": (
        Case({**GPTQ, "dynamic": {".*k_proj": {"group_size": 64}}}, gptq(), {"k_proj": gptq(size=64)}),
        "in different ways",
    ),
    "one kept": (Case({**GPTQ, "dynamic": {"-:.*k_proj": {}}}, gptq(), {"k_proj": None}), "k not quantised"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_parts_that_are_stored_in_different_ways_become_dense_and_it_is_said(name: str, tmp_path: Path) -> None:
    case, words = UNLIKE[name]
    folder, dense, _ = write_quantised(tmp_path, case)
    facts = model_facts(str(folder))
    assert any(said.startswith("q, k and v are made dense") and words in said for said in facts.dequantised)
    schemes = {weight.role: facts.schemes.of(weight).name for weight in facts.architecture.weights}  # type: ignore[union-attr]
    assert (schemes["qkv"], schemes["gate_up"]) == ("dense", "w4a16")
    close(logits(folder), dense_logits(dense))


def test_orders_that_differ_make_the_weight_dense(tmp_path: Path) -> None:
    folder, dense, _ = write_quantised(tmp_path, Case({**GPTQ, "desc_act": True}, gptq(shuffled=True)))
    tensors = load_file(folder / "model.safetensors")
    key = "model.layers.0.self_attn.k_proj"
    order = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    plain = load_file(dense / "model.safetensors")
    # The rows of words are of inputs: columns that are moved take their group along.
    words = tensors[f"{key}.qweight"]
    nibbles = torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], 1).flatten(0, 1)[order]
    packed = sum(nibbles.unflatten(0, (-1, 8))[:, at].long() << (4 * at) for at in range(8))
    tensors[f"{key}.qweight"] = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()
    tensors[f"{key}.g_idx"] = tensors[f"{key}.g_idx"][order].contiguous()
    plain[f"{key}.weight"] = plain[f"{key}.weight"][:, order].contiguous()
    write_tensors(folder, tensors)
    write_tensors(dense, plain)
    facts = model_facts(str(folder))
    assert facts.dequantised == [
        "q, k and v are made dense while they are loaded: their inputs have different orders (layers 0)"
    ]
    close(logits(folder), dense_logits(dense))


def test_rows_in_groups_of_heads(tmp_path: Path) -> None:
    """InternLM2 has queries, keys and values in one matrix, head by head."""
    names = ("wqkv", "wo", "w1", "w2", "w3")
    changes = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False}
    folder, dense, _ = write_quantised(tmp_path, Case(AWQ, awq(), {name: awq() for name in names}, changes))
    close(logits(folder), dense_logits(dense))
    assert "gate_up" in {weight.role for weight in model_facts(str(folder)).architecture.weights}  # type: ignore[union-attr]


# --- ways of loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case({**GPTQ, "desc_act": True, "lm_head": True}, gptq(shuffled=True), {"lm_head": gptq(shuffled=True)}),
        Case(
            {**FP8, "weight_block_size": [32, 32]}, float_quantized("block", block=(32, 32), scale="weight_scale_inv")
        ),
        Case(of_groups("int-quantized", INT8, of_tensor(False)), int_quantized(inputs="static")),
    ],
    ids=["gptq", "fp8", "int8"],
)
def test_what_arrives_piece_by_piece_is_what_reading_gives(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged, "PIECE_BYTES", 256)
    folder, _, _ = write_quantised(tmp_path, case, shards=2)
    facts, devices = model_facts(str(folder)), (torch.device("cpu"), torch.device(DEVICE))
    checkpoint = SafetensorsCheckpoint(facts.files)
    weights = facts.architecture.weights  # type: ignore[union-attr]
    matrices = matrices_of(weights, quantisation_of(facts.quantisation), checkpoint.tensors)
    seen: list[tuple[int, int]] = []
    read, arrived = (
        list(
            stream(checkpoint, weights, torch.float32, device, lambda *at: seen.append(at), (), matrices, facts.schemes)
        )
        for stream, device in zip((place.stream, staged.stream), devices, strict=True)
    )
    held = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    assert seen.count((held, held)) == 2
    for one, other in zip(read, arrived, strict=True):
        assert type(one.tensor) is type(other.tensor)
        assert torch.equal(_dense(one.tensor), _dense(other.tensor))


def _dense(tensor: Any) -> Tensor:
    return (tensor if isinstance(tensor, Tensor) else tensor.dense(torch.float32)).cpu()


@pytest.mark.parametrize(
    "case",
    [
        Case({**GPTQ, "desc_act": True, "sym": False, "bits": 8}, gptq()),
        Case({**FP8, "activation_scheme": "static"}, awq()),
        Case(of_groups("pack-quantized", INT4), awq()),
    ],
    ids=["gptq", "fp8", "packed"],
)
def test_random_weights_are_stored_as_the_settings_say(case: Case, tmp_path: Path) -> None:
    folder, _, _ = write_quantised(tmp_path, case)
    plan = planned(folder, load_way="DUMMY")
    runner = CpuRunner()
    runner.load(plan, lambda done, total: None)
    driver = Driver(runner)
    assert torch.isfinite(driver.logits(driver.row(0, IDS))[0]).all()
    held = sum(tensor.nbytes for tensor in runner.decoder.tensors().values())
    weights = plan.model.architecture.weights  # type: ignore[union-attr]
    assert weight_bytes(weights, 4, plan.schemes, nbytes=cpu_nbytes) == pytest.approx(held, rel=0.03)
    assert held < 0.8 * weight_bytes(weights, 4)


def test_a_later_start_gives_the_same_logits_after_a_death(tmp_path: Path) -> None:
    """Replay: another generation gets prompt and emitted tokens at once."""
    folder, _, _ = write_quantised(
        tmp_path, Case({**GPTQ, "desc_act": True, "sym": False}, gptq(symmetric=False, shuffled=True))
    )
    first, second = CpuRunner(), CpuRunner()
    for runner in (first, second):
        runner.load(planned(folder), lambda done, total: None)
    driver, again = Driver(first), Driver(second, scattered=True, poisoned=True)
    driver.logits(driver.row(0, IDS))
    emitted = [7, 8, 9]
    lived = [driver.logits(driver.row(0, [token], at))[0] for at, token in enumerate(emitted, 1)]
    replayed = again.logits(again.row(3, IDS + emitted[:2], 2))[0]
    torch.testing.assert_close(replayed[-1], lived[1][0], rtol=0, atol=1e-4)
    torch.testing.assert_close(again.logits(again.row(3, emitted[2:], 3))[0], lived[2], rtol=0, atol=1e-4)
