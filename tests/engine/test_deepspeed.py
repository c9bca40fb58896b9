"""A checkpoint of Megatron-DeepSpeed's pipeline is the same model as the Hugging Face directory, to the last bit."""

from __future__ import annotations

import json
import os
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from deepspeed_damage import records_of
from deepspeed_layout import COLUMNS, ROWS, file_of, modules_of, write_deepspeed
from leftovers import descriptors, no_new_descriptors
from lightllmd.architecture.families import architecture_of
from lightllmd.config.stamps import stamps_of
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.errors import ConfigInvalid, ModelChanged, WeightsInvalid
from lightllmd.probe.model import model_facts
from lightllmd.weights import place, plain, staged
from lightllmd.weights.deepspeed import deepspeed_files, deepspeed_tensors
from lightllmd.weights.plain import PlainCheckpoint
from tiny_models import BASE, VARIANTS, Driver, load, plan_for, tensors_of, write_model, write_tensors

IDS = [3, 14, 15, 92, 65, 35]
TINY = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
FOUR = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}  # for four ranks and four stages
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def logits(folder: Path, dtype: str = "float32") -> torch.Tensor:
    driver = Driver(load(folder, dtype=dtype))
    return driver.logits(driver.row(0, IDS))[0]


def hugging_face(folder: Path, changes: dict[str, Any], dtype: torch.dtype) -> Path:
    write_model(folder, changes)
    tensors = tensors_of({**BASE, **changes})
    write_tensors(folder, {name: tensor.to(dtype) for name, tensor in tensors.items()})
    return folder


def opened(folder: Path) -> PlainCheckpoint:
    config = json.loads((folder / "config.json").read_text())
    architecture = architecture_of(config["model_type"], config)
    return PlainCheckpoint(deepspeed_tensors(deepspeed_files(folder, architecture), architecture))


@pytest.mark.parametrize(("ranks", "stages"), [(None, 1), (1, 4), (2, 2), (2, 4), (4, 2), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_its_logits_are_those_of_the_hugging_face_directory(
    tmp_path: Path, ranks: int | None, stages: int, dtype: torch.dtype
) -> None:
    theirs = write_deepspeed(tmp_path / "ds", FOUR, ranks=ranks, stages=stages, dtype=dtype)
    ours = hugging_face(tmp_path / "hf", FOUR, dtype)
    for computed in ("float32", "bfloat16"):
        assert torch.equal(logits(theirs, computed), logits(ours, computed))


@pytest.mark.parametrize("variant", ["biases", "tied", "odd vocabulary", "head_dim given", "qwen2", "qwen3"])
def test_so_are_those_of_what_names_its_tensors_as_llama_does(tmp_path: Path, variant: str) -> None:
    changes = VARIANTS[variant]
    assert torch.equal(logits(write_deepspeed(tmp_path / "ds", changes)), logits(write_model(tmp_path / "hf", changes)))


@pytest.mark.parametrize("variant", ["gemma2", "olmo2"])
def test_families_with_other_names_are_refused_by_name(tmp_path: Path, variant: str) -> None:
    folder = write_deepspeed(tmp_path, VARIANTS["plain"])
    (folder / "config.json").write_text(json.dumps(BASE | VARIANTS[variant]))
    with pytest.raises(ConfigInvalid, match=rf'"DS" reads tensors with the names of Llama.*, not {variant}'):
        model_facts(str(folder), load_way="DS")


def test_a_model_that_scores_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_deepspeed(tmp_path, {"architectures": ["LlamaForSequenceClassification"]})
    with pytest.raises(ConfigInvalid, match='"DS" has no place for the head of a model that scores'):
        model_facts(str(folder), load_way="DS")


def test_embedding_and_head_may_be_split_by_vocabulary(tmp_path: Path) -> None:
    split = write_deepspeed(tmp_path / "ds", split_vocabulary=True)
    assert tuple(torch.load(split / file_of(1, 0))["weight"].shape) == (64, 64)
    assert tuple(torch.load(split / file_of(7, 1))["lm_head.weight"].shape) == (64, 64)
    assert torch.equal(logits(split), logits(write_model(tmp_path / "hf")))


def test_of_what_is_the_same_on_all_ranks_the_last_ones_counts(tmp_path: Path) -> None:
    """As in the original, where ranks differ in a norm."""
    folder = write_deepspeed(tmp_path / "ds")
    norm = tensors_of(BASE)["model.norm.weight"]
    torch.save(OrderedDict(weight=norm + 1), folder / file_of(6, 0))
    assert torch.equal(logits(folder), logits(write_model(tmp_path / "hf")))


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    folder = write_deepspeed(tmp_path / "ds")
    for number, rank in ((3, 0), (3, 1), (4, 0), (4, 1)):
        state = torch.load(folder / file_of(number, rank))
        torch.save({**state, "self_attn.rotary_emb.inv_freq": torch.ones(8)}, folder / file_of(number, rank))
    assert torch.equal(logits(folder), logits(write_model(tmp_path / "hf")))


def test_modules_without_weights_are_not_looked_at(tmp_path: Path) -> None:
    folder = write_deepspeed(tmp_path / "ds")
    for number in (0, 2, 5):
        (folder / file_of(number, 0)).write_bytes(b"nothing that could be read")
    facts = model_facts_without_tokenizer(folder)
    assert len(facts.files) == 10
    assert torch.equal(logits(folder), logits(write_model(tmp_path / "hf")))


def model_facts_without_tokenizer(folder: Path) -> Any:
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})
    )
    return model_facts(str(folder), load_way="DS")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_probes_facts_are_those_of_the_hugging_face_directory(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs = model_facts_without_tokenizer(write_deepspeed(tmp_path / "ds", {"torch_dtype": None}, dtype=dtype))
    (hugging := hugging_face(tmp_path / "hf", {"torch_dtype": None}, dtype)).joinpath("tokenizer.json").write_text(
        (tmp_path / "ds/tokenizer.json").read_text()
    )
    ours = model_facts(str(hugging))
    alike = {"path": "", "format": "", "files": [], "stamps": []}
    assert msgspec.structs.replace(theirs, **alike) == msgspec.structs.replace(ours, **alike)
    assert theirs.weight_bytes == ours.weight_bytes
    assert (theirs.format, len(theirs.files)) == ("deepspeed", 10)
    assert {one.path for one in theirs.weight_stamps} == set(theirs.files)


# --- how tensors may lie in a file ------------------------------------------------------------------------------------


def views(whole: torch.Tensor, rank: int, kind: str) -> torch.Tensor:
    """The columns of a rank of two, stored in another way than a contiguous tensor of its own."""
    part = whole.chunk(2, 1)[rank]
    if kind == "a view of the whole matrix":
        return part
    if kind == "by columns":
        return part.t().contiguous().t()
    if kind == "with an offset":
        return torch.cat([torch.zeros(7), part.reshape(-1)])[7:].view(part.shape)
    assert kind == "a parameter"
    return torch.nn.Parameter(part.clone())


@pytest.mark.parametrize("kind", ["a view of the whole matrix", "by columns", "with an offset", "a parameter"])
@pytest.mark.parametrize("most", [4, 4 * 50, 4 * 1000, 16 << 20])
def test_views_offsets_and_parameters_are_read_as_torch_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, most: int
) -> None:
    monkeypatch.setattr(plain, "CHUNK_BYTES", most)
    monkeypatch.setattr(staged, "PIECE_BYTES", max(64, most))
    folder, whole = write_deepspeed(tmp_path / "ds", TINY), tensors_of(BASE | TINY)
    for rank in (0, 1):
        state = torch.load(folder / file_of(3, rank))
        for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            state[name] = views(whole[f"model.layers.0.{name}"], rank, kind)
        torch.save(state, folder / file_of(3, rank))
    checkpoint, weights = opened(folder), architecture_of("llama", BASE | TINY).weights
    seen: list[tuple[int, int]] = []
    for stream in (place.stream, staged.stream):
        seen.clear()
        for loaded in stream(checkpoint, weights, torch.float32, DEVICE, lambda *at: seen.append(at)):
            expected = torch.cat([whole[part.name] for part in loaded.spec.parts])
            assert torch.equal(loaded.tensor.cpu(), expected), loaded.spec.key
        held = sum(tensor.nbytes for tensor in whole.values())
        assert seen[-1] == (held, held)
        assert seen == sorted(seen)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_each_pickle_protocol_is_read_as_torch_reads_it(tmp_path: Path, protocol: int) -> None:
    from lightllmd.weights.torch_header import read_torch_header

    shared = torch.arange(24.0).view(6, 4)
    state = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5)).state_dict()
    state |= {"first": shared[:2], "rest": shared[2:], "empty": torch.empty(0, 3), "scalar": torch.tensor(2.0)}
    state["numbers"] = torch.arange(6)
    state["half"] = torch.ones(3, dtype=torch.float16)
    torch.save(state, tmp_path / "layer.pt", pickle_protocol=protocol)
    body = (tmp_path / "layer.pt").read_bytes()
    kinds = {"I64": torch.int64, "F32": torch.float32, "F16": torch.float16}
    found = read_torch_header(tmp_path / "layer.pt")
    assert [tensor.name for tensor in found] == list(state)
    for tensor, (name, value) in zip(found, state.items(), strict=True):
        raw = bytearray(body[tensor.offset : tensor.offset + tensor.nbytes])
        read = torch.frombuffer(raw, dtype=kinds[tensor.type]) if raw else torch.empty(0)
        assert torch.equal(read.view(tensor.shape), value), name


def test_records_whose_sizes_are_in_64_bits_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of 4 GiB and more are."""
    folder = write_deepspeed(tmp_path / "ds")
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    for path in folder.glob("layer*"):
        records = records_of(path)
        with zipfile.ZipFile(path, "w") as archive:
            for name, body in records.items():
                with archive.open(name, "w", force_zip64=True) as file:
                    file.write(body)
    assert torch.equal(logits(folder), logits(write_model(tmp_path / "hf")))


def test_files_may_be_links(tmp_path: Path) -> None:
    """As in the cache of Hugging Face's hub."""
    folder = write_deepspeed(tmp_path / "ds")
    (tmp_path / "blobs").mkdir()
    for path in folder.glob("layer*"):
        path.symlink_to(path.rename(tmp_path / "blobs" / path.stem))
    assert torch.equal(logits(folder), logits(write_model(tmp_path / "hf")))


def test_the_ranks_of_a_matrix_are_found_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    changes = {**FOUR, "hidden_size": 96, "intermediate_size": 132, "head_dim": 8, "num_attention_heads": 12}
    changes |= {"num_key_value_heads": 12, "num_hidden_layers": 1}
    theirs = write_deepspeed(tmp_path / "ds", changes, ranks=12)
    assert torch.equal(logits(theirs), logits(write_model(tmp_path / "hf", changes)))


def test_hundreds_of_files_need_few_descriptors(tmp_path: Path) -> None:
    """Of layers times ranks there may be more than a process may have open."""
    theirs = write_deepspeed(tmp_path, FOUR | {"num_hidden_layers": 12}, ranks=4)
    checkpoint = opened(theirs)
    weights = architecture_of("llama", BASE | FOUR | {"num_hidden_layers": 12}).weights
    before, most = descriptors(), 0
    with no_new_descriptors():
        for _ in staged.stream(checkpoint, weights, torch.float32, DEVICE, lambda *at: None):
            most = max(most, descriptors())
    assert most - before < 30


def test_no_run_is_longer_than_it_may_be(tmp_path: Path) -> None:
    """So that reading takes little memory, whatever a tensor has and however it lies."""
    checkpoint, seen = opened(write_deepspeed(tmp_path, {"vocab_size": 1000})), 0
    for name, info in checkpoint.tensors.items():
        runs = list(checkpoint.runs(name, torch.empty(info.shape), 1000))
        assert max(run.nbytes for run in runs) <= 1000
        assert sum(run.out.numel() for run in runs) == info.elements
        seen += len(runs)
    assert seen > 300


def test_who_slept_and_woke_reads_it_again(tmp_path: Path) -> None:
    folder = write_deepspeed(tmp_path)
    runner = load(folder)
    expected = Driver(runner).logits(Driver(runner).row(0, IDS))
    runner.release(lambda done, total: None)
    seen: list[tuple[int, int]] = []
    runner.restore(lambda *at: seen.append(at))
    assert torch.equal(Driver(runner).logits(Driver(runner).row(0, IDS))[0], expected[0])
    assert seen[-1] == (sum(tensor.nbytes for tensor in tensors_of(BASE).values()),) * 2
    runner.release(lambda done, total: None)
    os.truncate(folder / file_of(4, 1), 1000)
    with pytest.raises(WeightsInvalid, match=rf"{file_of(4, 1)}: truncated"):
        runner.restore(lambda done, total: None)


# --- files that change, loading that fails ----------------------------------------------------------------------------


def test_a_file_that_changed_since_the_plan_is_told_by_name(tmp_path: Path) -> None:
    plan = plan_for(write_deepspeed(tmp_path))
    assert plan.model is not None
    plan = msgspec.structs.replace(plan, model=msgspec.structs.replace(plan.model, stamps=stamps_of(plan.model.files)))
    CpuRunner().load(plan, lambda done, total: None)
    state = torch.load(tmp_path / file_of(4, 1))
    state["mlp.up_proj.weight"] += 1
    torch.save(state, tmp_path / file_of(4, 1))
    with pytest.raises(ModelChanged, match=rf"{file_of(4, 1)} changed since the model was planned"):
        CpuRunner().load(plan, lambda done, total: None)


@pytest.mark.parametrize("stream", [place.stream, staged.stream])
def test_a_file_cut_off_while_it_is_read_is_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: Any
) -> None:
    monkeypatch.setattr(plain, "CHUNK_BYTES", 1024)
    monkeypatch.setattr(staged, "PIECE_BYTES", 1024)
    checkpoint = opened(write_deepspeed(tmp_path))

    def cut(done: int, total: int) -> None:
        if done > 4000:
            os.truncate(tmp_path / file_of(4, 1), 500)

    with pytest.raises(WeightsInvalid, match=rf"{file_of(4, 1)}: truncated while it was read: it has no byte \d+"):
        list(stream(checkpoint, architecture_of("llama", BASE).weights, torch.float32, DEVICE, cut))


def test_random_layouts_are_read_back(tmp_path: Path) -> None:
    """Uneven shards, any dtype and order of keys."""
    drawn = random.Random(5)
    whole = tensors_of(BASE)
    folder = write_deepspeed(tmp_path, ranks=3)
    for number, state in modules_of(whole, 2).items():
        cuts = {name: sorted(drawn.sample(range(1, 32), 2)) for name in state}
        for rank in range(3):
            parts = []
            for name, tensor in state.items():
                axis = 0 if any(row in name for row in ROWS) else 1 if name.endswith(COLUMNS) else None
                begin, end = [0, *cuts[name], None][rank : rank + 2]
                index = {0: (slice(begin, end),), 1: (slice(None), slice(begin, end)), None: ()}[axis]
                parts.append((name, tensor[index].to(torch.float64)))
            drawn.shuffle(parts)
            torch.save(OrderedDict(parts), folder / file_of(number, rank))
    assert torch.equal(logits(folder), logits(write_model(tmp_path / "hf")))
