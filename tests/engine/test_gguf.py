"""GGUF files: every block type is dequantised as the gguf package does it, names and rotary rows are put back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from gguf_files import WIDE, random_rows, write_gguf
from lightllmd.architecture.families import architecture_of
from lightllmd.errors import ConfigInvalid, WeightsInvalid
from lightllmd.probe.model import model_facts
from lightllmd.weights.gguf import GgufCheckpoint
from lightllmd.weights.gguf_header import GGUF_READABLE
from lightllmd.weights.verify import verify
from tiny_models import BASE, VARIANTS, Driver, load, tensors_of, write_model, write_tensors


def logits(model: Path) -> torch.Tensor:
    driver = Driver(load(model))
    return driver.logits(driver.row(0, [5, 77, 3, 42, 100, 9, 1]))[0]


@pytest.mark.parametrize("variant", ["plain", "tied", "biases", "three heads", "head_dim given", "qwen2", "qwen3"])
def test_a_gguf_file_is_the_same_model_as_the_directory(
    tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightllmd.weights.gguf.CHUNK_ELEMENTS", 500)  # a matrix of any size is read in several
    config = {**BASE, **VARIANTS[variant]}
    folder, file = write_model(tmp_path / "hf", VARIANTS[variant]), write_gguf(tmp_path / "m.gguf", config, Kind.F32)
    assert torch.equal(logits(folder), logits(file))


@pytest.mark.parametrize("variant", ["qwen2", "qwen3"])
def test_the_probe_understands_a_qwen_file(tmp_path: Path, variant: str) -> None:
    config = {**BASE, **VARIANTS[variant]}
    facts = model_facts(str(write_gguf(tmp_path / "m.gguf", config, Kind.Q8_0)))
    spec = architecture_of(facts.model_type, facts.hf_config).spec
    assert (facts.model_type, spec) == (variant, architecture_of(variant, config).spec)


def test_a_split_file_computes_what_the_whole_one_computes(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", BASE, Kind.F32)
    (tmp_path / "split").mkdir()
    write_gguf(tmp_path / "split/m.gguf", BASE, Kind.F32, np.linspace(1, 1, 8, dtype=np.float32), parts=6)
    first = tmp_path / "split/m-00001-of-00004.gguf"
    for model_dir in (first, first.parent):
        facts = model_facts(str(model_dir))
        assert (facts.path, len(facts.files)) == (str(first), 4)
        assert facts.weight_elements == model_facts(str(whole)).weight_elements
    assert torch.equal(logits(first), logits(whole))
    second = first.with_name("m-00002-of-00004.gguf")
    with pytest.raises(WeightsInvalid, match="is not the first part of its split GGUF: name m-00001-of-00004"):
        model_facts(str(second))
    body = second.read_bytes()
    second.write_bytes(body[:-100])
    with pytest.raises(WeightsInvalid, match=f"{second.name}: truncated"):
        model_facts(str(first))
    second.write_bytes(first.read_bytes())
    with pytest.raises(WeightsInvalid, match=f"{second.name}: .* part 2 of 4"):
        model_facts(str(first))
    second.unlink()
    with pytest.raises(WeightsInvalid, match=f"{second.name}: can't be read: No such file"):
        model_facts(str(first))
    second.write_bytes(body)
    first.rename(tmp_path / "split/other.gguf")
    with pytest.raises(WeightsInvalid, match="must be named NAME-00001-of-00004"):
        model_facts(str(tmp_path / "split/other.gguf"))


def test_rope_divisors_of_llama3_are_taken_from_their_tensor(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = {**BASE, "rope_theta": 500000.0}
    base = 500000.0 ** (np.arange(0, 16, 2) / 16)
    ramp = np.clip((8192 / (2 * np.pi * base) - 1) / 3, 0, 1)
    divisors = (1 / ((1 - ramp) / 8 + ramp)).astype(np.float32)
    folder = write_model(tmp_path / "hf", {**config, "rope_scaling": {"rope_type": "llama3", **scaling}})
    file = write_gguf(tmp_path / "llama3.gguf", config, Kind.F32, divisors)
    assert (logits(folder) - logits(file)).abs().max() < 1e-5
    odd = write_gguf(tmp_path / "odd.gguf", config, Kind.F32, np.linspace(1, 3, 8, dtype=np.float32))
    assert (logits(folder) - logits(odd)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
def test_a_quantised_file_computes_what_its_rounded_weights_compute(tmp_path: Path, kind: Kind) -> None:
    config = {**BASE, **WIDE}
    file = write_gguf(tmp_path / "m.gguf", config, kind)
    folder = write_model(tmp_path / "hf", WIDE)
    # Rounding acts on blocks of a row, so the order of rows makes no difference to it.
    rounded = {
        name: torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind).copy())
        if tensor.dim() > 1
        else tensor
        for name, tensor in tensors_of(config).items()
    }
    write_tensors(folder, rounded)
    assert torch.equal(logits(file), logits(folder))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # random bytes are NaN, too
@pytest.mark.parametrize("kind", sorted(GGUF_READABLE))
def test_every_readable_block_type_is_read_as_the_gguf_package_reads_it(tmp_path: Path, kind: str) -> None:
    """Random bytes as blocks, a matrix of several chunks, so that a wrong seam would show."""
    columns = 256
    raw = random_rows(kind, columns, 2100)
    rows = len(raw)
    file = tmp_path / "m.gguf"
    write_gguf(file, {**BASE, **WIDE}, Kind.F32)
    checkpoint = GgufCheckpoint(file)
    info = checkpoint.tensors["model.embed_tokens.weight"]
    where = {"offset": file.stat().st_size, "nbytes": raw.nbytes}
    checkpoint.tensors["raw"] = replace(info, name="raw", shape=(rows, columns), type=kind, **where)
    file.write_bytes(file.read_bytes() + raw.tobytes())
    out = torch.empty(rows, columns)
    assert sum(checkpoint.read("raw", out)) == raw.nbytes
    expected = torch.from_numpy(gguf.dequantize(raw, Kind[kind]).astype(np.float32)).view(rows, columns)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("model_type", ["gemma2", "olmo2"])
def test_a_family_whose_gguf_files_are_not_understood_is_refused_by_name(tmp_path: Path, model_type: str) -> None:
    """With random weights, too: what its metadata mean is not known either."""
    file = write_gguf(tmp_path / "m.gguf", BASE | {"model_type": model_type, "tie_word_embeddings": True}, Kind.F32)
    for dummy in (False, True):
        with pytest.raises(ConfigInvalid, match=f"GGUF files of models of type {model_type} are not available yet"):
            model_facts(str(file), load_way="DUMMY" if dummy else "HF")


def test_a_truncated_or_unreadable_gguf_is_refused_by_tensor(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", BASE, Kind.F32)
    checkpoint = GgufCheckpoint(file)
    name = "model.layers.0.mlp.up_proj.weight"
    checkpoint.tensors[name] = replace(checkpoint.tensors[name], type="IQ1_M")
    with pytest.raises(WeightsInvalid, match=r"m\.gguf: tensor .*mlp\.up_proj\.weight is of type IQ1_M"):
        verify(architecture_of("llama", BASE), checkpoint.tensors, checkpoint.readable, str(file))
    file.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(WeightsInvalid, match="truncated: tensor "):
        GgufCheckpoint(file)
