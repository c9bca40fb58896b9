"""Weight files that are damaged, cut off or gone, before loading or while they are read: told by name, no crash."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from lightllmd import errors
from lightllmd.architecture.families import architecture_of
from lightllmd.config.plan import encode_plan
from lightllmd.config.stamps import stamp
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.errors import ModelChanged, WeightsInvalid
from lightllmd.ipc import channel, flight_record, messages
from lightllmd.probe.model import model_facts
from lightllmd.weights import plain, staged
from lightllmd.weights.gguf import GgufCheckpoint
from lightllmd.weights.loaded import Progress
from lightllmd.weights.safetensors import SafetensorsCheckpoint
from tiny_models import BASE, plan_for, write_model

FILE = "model.safetensors"


def quiet(done: int, total: int) -> None:
    pass


def header_end(file: Path) -> int:
    return 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]


def with_header(file: Path, change: Callable[[dict], object]) -> None:
    body, end = file.read_bytes(), header_end(file)
    header = json.loads(body[8:end])
    change(header)
    written = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(written)) + written + body[end:])


def become_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


NORM = "model.norm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (Path.unlink, r"can't be read: No such file"),
    "a folder": (become_a_folder, r"can't be read: it is a directory"),
    "empty": (lambda file: file.write_bytes(b""), "0 bytes are no safetensors file"),
    "cut off in its length": (lambda file: os.truncate(file, 5), "5 bytes are no safetensors file"),
    "cut off in its header": (lambda file: os.truncate(file, 100), "truncated inside its header"),
    "nothing but its header": (lambda file: os.truncate(file, header_end(file)), "truncated: tensor .* ends at byte"),
    "one byte short": (lambda file: os.truncate(file, file.stat().st_size - 1), "truncated: tensor .* ends at byte"),
    "another kind of file": (lambda file: file.write_bytes(b"\x7fELF" * 4000), "no safetensors file"),
    "no JSON": (lambda file: file.write_bytes(struct.pack("<Q", 64) + b"{" * 64 + file.read_bytes()), "damaged"),
    "offsets that are no integers": (
        lambda file: with_header(file, lambda header: header[NORM].update(data_offsets=[0.0, 256.0])),
        "damaged safetensors header",
    ),
    "more bytes than its shape": (
        lambda file: with_header(file, lambda header: header[NORM].update(shape=[63])),
        r"damaged safetensors header: .*tensor model\.norm\.weight F32\[63\] has 256 bytes",
    ),
    "a type that nobody knows": (
        lambda file: with_header(file, lambda header: header[NORM].update(dtype="F5")),
        r"tensor model\.norm\.weight is of type F5",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_was_damaged_since_the_plan_is_told_by_name(tmp_path: Path, damage: str) -> None:
    plan = plan_for(write_model(tmp_path))
    damaged, words = DAMAGE[damage]
    damaged(tmp_path / FILE)
    with pytest.raises(WeightsInvalid, match=words) as refused:
        CpuRunner().load(plan, quiet)
    assert str(tmp_path / FILE) in str(refused.value) or "model.norm.weight" in str(refused.value)


@pytest.mark.parametrize("damage", sorted(DAMAGE.keys() - {"gone", "a folder", "a type that nobody knows"}))
def test_the_probe_refuses_it_too(tmp_path: Path, damage: str) -> None:
    DAMAGE[damage][0](write_model(tmp_path) / FILE)
    with pytest.raises(WeightsInvalid, match=DAMAGE[damage][1]):
        model_facts(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, r"tensor model\.layers\.2\..* \(and \d+ more\) is missing"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\..* is in the checkpoint, but the config has no place"),
        ({"intermediate_size": 128}, r"has shape \[96, 64\], the config says \[128, 64\]"),
        ({"vocab_size": 256}, r"has shape \[128, 64\], the config says \[256, 64\]"),
    ],
)
def test_a_config_of_another_shape_is_told_by_tensor(tmp_path: Path, changes: dict[str, int], words: str) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE | changes))
    with pytest.raises(WeightsInvalid, match=words):
        CpuRunner().load(plan_for(tmp_path), quiet)


def read_on_cpu(folder: Path, progress: Progress) -> None:
    CpuRunner().load(plan_for(folder), progress)


def read_as_a_gpu_does(folder: Path, progress: Progress) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = architecture_of("llama", BASE).weights
    for _ in staged.stream(SafetensorsCheckpoint([folder / FILE]), weights, torch.float32, device, progress):
        pass


@pytest.mark.parametrize("read", [read_on_cpu, read_as_a_gpu_does])
@pytest.mark.parametrize("left", [0, 5000])
def test_a_file_cut_off_while_it_is_read_is_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path, Progress], None], left: int
) -> None:
    """Pages of a mapped file that are beyond its end can't be touched: SIGBUS."""
    monkeypatch.setattr(staged, "PIECE_BYTES", 1024)
    monkeypatch.setattr(plain, "CHUNK_BYTES", 1024)
    file = write_model(tmp_path) / FILE

    def cut(done: int, total: int) -> None:
        if done > 4000:
            os.truncate(file, left)

    with pytest.raises(WeightsInvalid, match=rf"{FILE}: truncated while it was read: it has no byte \d+"):
        read(tmp_path, cut)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_files_that_are_not_the_plans_are_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """They may be put back, so nothing is wrong with the plan."""
    monkeypatch.setattr(plain, "CHUNK_BYTES", 1024)
    file = write_model(tmp_path) / FILE
    plan = plan_for(tmp_path)
    assert plan.model is not None
    plan = msgspec.structs.replace(plan, model=msgspec.structs.replace(plan.model, stamps=[stamp(str(file))]))
    CpuRunner().load(plan, quiet)
    if when == "before":
        os.truncate(file, 5)
    with pytest.raises(ModelChanged, match=rf"{FILE} changed since the model was planned"):
        CpuRunner().load(plan, lambda done, total: os.truncate(file, 5000) if done > 4000 else None)


def test_a_gguf_file_cut_off_while_it_is_read_is_no_crash(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_embedding_length(64)
    for number in ("block_count", "context_length", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{number}")(4)
    writer.add_tensor("token_embd.weight", torch.rand(9000, 64).numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    checkpoint = GgufCheckpoint(tmp_path / "m.gguf")
    chunks = checkpoint.read("model.embed_tokens.weight", torch.empty(9000, 64))
    next(chunks)
    os.truncate(tmp_path / "m.gguf", 4096)
    with pytest.raises(WeightsInvalid, match="truncated while it was read: it has no byte"):
        list(chunks)
    (tmp_path / "m.gguf").unlink()
    with pytest.raises(WeightsInvalid, match="can't be read: No such file"):
        GgufCheckpoint(tmp_path / "m.gguf")


def test_the_engines_process_ends_with_78_and_says_why(tmp_path: Path) -> None:
    plan = plan_for(write_model(tmp_path, {"num_hidden_layers": 1}))
    os.truncate(tmp_path / FILE, 20_000)
    (tmp_path / "metrics").mkdir()
    link, theirs = channel.pair()
    flight = flight_record.create()
    words = [str(number) for number in (theirs.fileno(), os.getpid(), flight)]
    try:
        link.send(
            messages.EngineConfigure(
                encode_plan(plan), 1, 0, f"ipc://{tmp_path}/engine", str(tmp_path / "metrics"), "engine-0"
            )
        )
        command = [sys.executable, "-m", "lightllmd.engine", *words]
        ended = subprocess.run(command, pass_fds=(theirs.fileno(), flight), stderr=subprocess.PIPE, timeout=100)
        said = [message for message in link.receive() if isinstance(message, messages.Failed)]
    finally:
        theirs.close()
        link.close()
        os.close(flight)
    assert ended.returncode == errors.EXIT_CONFIG
    assert [message.kind for message in said] == ["weights"]
    assert "truncated: tensor " in said[0].message
    assert str(tmp_path / FILE) in said[0].message
