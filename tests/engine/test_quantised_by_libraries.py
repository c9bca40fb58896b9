"""Checkpoints that the formats' own libraries wrote have those libraries' logits.

The libraries are the extra `quantisers`; a test is skipped where its library is missing.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightllmd.engine.runners.cpu import CpuRunner
from model_folders import TOKENIZER
from quantised_checkpoints import LINEARS, planned
from tiny_models import BASE, Driver, transformers_model, write_model, write_tensors

IDS = [3, 14, 15, 92, 65, 35, 9, 26, 5]
CHANGES = {"hidden_size": 128, "intermediate_size": 256}


def with_tokenizer(folder: Path) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder


def ours(folder: Path) -> Tensor:
    runner = CpuRunner()
    runner.load(planned(with_tokenizer(folder)), lambda done, total: None)
    driver = Driver(runner)
    return driver.logits(driver.row(0, IDS))[0]


@torch.inference_mode()
def theirs(model: Any) -> Tensor:
    return model(torch.tensor([IDS])).logits[0].float()


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert (found - wanted).abs().max().item() < tolerance * wanted.abs().max().item()


SCHEMES = {  # of llm-compressor, and what rounding of inputs may make of a difference in fp32
    "W4A16": 1e-4,
    "W4A16_ASYM": 1e-4,
    "W8A16": 1e-4,
    "W8A8": 0.06,  # its scales of int8 inputs reach 127.5, ours 127
    "FP8_DYNAMIC": 0.01,
    "FP8_BLOCK": 0.01,
    "FP8": 0.01,
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_llm_compressors(scheme: str, tmp_path: Path) -> None:
    llmcompressor = pytest.importorskip("llmcompressor")
    from datasets import Dataset
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import PreTrainedTokenizerFast

    model = transformers_model(with_tokenizer(write_model(tmp_path / "dense", CHANGES)))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "dense" / "tokenizer.json"))
    asked: dict[str, Any] = {"pipeline": "datafree"}
    if scheme == "FP8":
        draw = torch.Generator().manual_seed(1)
        rows = [torch.randint(0, 128, (32,), generator=draw).tolist() for _ in range(8)]
        data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 32] * 8})
        asked = {"dataset": data, "num_calibration_samples": 8, "max_seq_length": 32, "pipeline": "basic"}
    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    llmcompressor.oneshot(model=model, tokenizer=tokenizer, recipe=recipe, **asked)
    wanted = theirs(model)
    model.save_pretrained(tmp_path / "quantised", save_compressed=True)
    close(ours(tmp_path / "quantised"), wanted, SCHEMES[scheme])


def linears(folder: Path) -> dict[str, Tensor]:
    held = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in held.items() if name.removesuffix(".weight").endswith(LINEARS)}


def replaced(folder: Path, dense: Path, of: dict[str, dict[str, Tensor]], settings: dict[str, Any], plain: Any) -> None:
    """Writes both: the quantised matrices in place of the dense ones, and what `plain` says they stand for."""
    held = load_file(dense / "model.safetensors")
    kept = {name: tensor for name, tensor in held.items() if name not in of}
    stored = {f"{name.removesuffix('weight')}{end}": part for name, parts in of.items() for end, part in parts.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BASE | CHANGES | {"quantization_config": settings}))
    write_tensors(folder, {name: part.contiguous() for name, part in (kept | stored).items()})
    write_tensors(dense, kept | plain)


def test_autoawqs(tmp_path: Path) -> None:
    pytest.importorskip("awq", exc_type=ImportError)
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    dense = write_model(tmp_path / "dense", CHANGES)
    stored, plain = {}, {}
    for name, weight in linears(dense).items():
        groups = weight.unflatten(1, (-1, 32))
        low, high = groups.amin(2), groups.amax(2)
        scales = ((high - low) / 15).half().float()
        zeros = (-low / scales).round().clamp(0, 15)
        # What is rounded lies on the grid, as AutoAWQ's own search leaves it.
        rounded = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15) - zeros[..., None]
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = (rounded * scales[..., None]).flatten(1)
        made = WQLinear_GEMM.from_linear(linear, 4, 32, scales=scales.t().contiguous(), zeros=zeros.t().contiguous())
        stored[name] = {"qweight": made.qweight, "qzeros": made.qzeros, "scales": made.scales}
        plain[name] = dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, 32).t().float().contiguous()
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    replaced(tmp_path / "quantised", dense, stored, settings, plain)
    close(ours(tmp_path / "quantised"), theirs(transformers_model(dense)), 2e-3)  # it dequantises in fp16


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_gptqmodels(bits: int, symmetric: bool, ordered: bool, form: str, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel", exc_type=ImportError)
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    dense = write_model(tmp_path / "dense", CHANGES)
    stored, plain = {}, {}
    for name, weight in linears(dense).items():
        rows, columns = weight.shape
        groups = torch.arange(columns) // 32
        if ordered:
            groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
        top = 2**bits - 1
        scales, zeros = torch.zeros(rows, columns // 32), torch.zeros(rows, columns // 32)
        rounded = torch.zeros_like(weight)
        for group in range(columns // 32):
            part = weight[:, groups == group]
            low, high = part.amin(1), part.amax(1)
            if symmetric:
                high = torch.maximum(-low, high)
                low = -high
            scales[:, group] = ((high - low) / top).half().float()
            zeros[:, group] = (top + 1) / 2 if symmetric else (-low / scales[:, group]).round()
            scale, zero = scales[:, group, None], zeros[:, group, None]
            rounded[:, groups == group] = ((part / scale).round() + zero).clamp(0, top).sub(zero) * scale
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = rounded
        made = TorchLinear(
            bits=bits,
            group_size=32,
            sym=symmetric,
            desc_act=ordered,
            in_features=columns,
            out_features=rows,
            bias=False,
        )
        made.pack(linear, scales, zeros, groups.int())
        made.post_init()
        plain[name] = made.dequantize_weight().t().float().contiguous()
        if form == "gptq":
            convert_gptq_v2_to_v1_format_module(made, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
        stored[name] = {end: getattr(made, end).clone() for end in ("qweight", "qzeros", "scales", "g_idx")}
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": symmetric, "desc_act": ordered}
    replaced(tmp_path / "quantised", dense, stored, settings | {"checkpoint_format": form}, plain)
    close(ours(tmp_path / "quantised"), theirs(transformers_model(dense)), 2e-3)  # it dequantises in fp16


@pytest.mark.parametrize("scales", ["float", "ue8m0"])
def test_transformers_float8(scales: str, tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize
    from transformers.utils.quantization_config import FineGrainedFP8Config

    config = FineGrainedFP8Config(weight_block_size=(64, 32), scale_fmt=scales)
    quantiser = Fp8Quantize(SimpleNamespace(quantization_config=config))
    dense = write_model(tmp_path / "dense", CHANGES)
    stored, plain = {}, {}
    for name, weight in linears(dense).items():
        made = quantiser.convert({name: weight})
        stored[name] = {end.removeprefix(name.removesuffix("weight")): part for end, part in made.items()}
        scale = made[f"{name}_scale_inv"].float()
        plain[name] = made[name].float() * scale.repeat_interleave(64, 0).repeat_interleave(32, 1)
    settings = {"quant_method": "fp8", "weight_block_size": [64, 32], "scale_fmt": scales}
    replaced(tmp_path / "quantised", dense, stored, settings, plain)
    model = transformers_model(dense)
    for module_name, module in model.named_modules():
        if module_name.endswith(LINEARS):
            module.register_forward_pre_hook(lambda module, inputs: (in_blocks(inputs[0]),))
    close(ours(tmp_path / "quantised"), theirs(model), 0.01)


def in_blocks(x: Tensor) -> Tensor:
    """Rounded to float8, each 32 inputs by a scale of their own."""
    groups = x.unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 448
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)
