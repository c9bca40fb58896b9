"""Quantised weights that are kept from one start to the next: the same ones, or none."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lightllmd.architecture.schemes import SCHEMES, scheme_of
from lightllmd.architecture.weight_schemes import SchemeRule, WeightSchemes
from lightllmd.config.plan import Plan
from lightllmd.config.stamps import stamps_of
from lightllmd.engine.runners import loading
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.errors import ModelChanged
from lightllmd.kernels import quantised
from lightllmd.weights import kept_file, kept_models, staged
from lightllmd.weights.place import stream
from rank_models import load_rank, ranks
from tiny_models import plan_for, write_model

W4A16 = WeightSchemes.all(scheme_of("w4a16", 32))
BIASED = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of kept models. Small pieces, so that each tensor has several."""
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "cache"))
    for module in (staged, kept_file):
        monkeypatch.setattr(module, "PIECE_BYTES", 1024)
    yield tmp_path / "cache" / "quantised"
    finish()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", BIASED)


def finish() -> None:
    """What is being written is on the disk."""
    for thread in threading.enumerate():
        if thread.name == kept_models.THREAD:
            thread.join()


def planned(folder: Path, schemes: WeightSchemes = W4A16, **options: Any) -> Plan:
    plan = plan_for(folder, schemes=schemes, **options)
    assert plan.model is not None
    return msgspec.structs.replace(
        plan,
        model=msgspec.structs.replace(plan.model, stamps=stamps_of(plan.model.files)),
        config=msgspec.structs.replace(
            plan.config, engine=msgspec.structs.replace(plan.config.engine, keep_quantised=True)
        ),
    )


def loaded(plan: Plan) -> dict[str, Tensor]:
    runner = CpuRunner()
    runner.load(plan, lambda done, total: None)
    finish()
    return runner.decoder.tensors()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return (tensor.to_dense() if tensor.layout == torch._mkldnn else tensor).contiguous().view(torch.uint8)

    return first.keys() == second.keys() and all(torch.equal(bits(first[key]), bits(second[key])) for key in first)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The checkpoints that are read: none by a start from a kept file."""
    seen: list[str] = []

    def noted(checkpoint: Any, *others: Any) -> Any:
        seen.append("")
        return stream(checkpoint, *others)

    monkeypatch.setattr(loading.place, "stream", noted)
    return seen


def test_each_rank_keeps_its_part(folder: Path, cache: Path, read: list[str]) -> None:
    plan = planned(folder)

    def parts() -> list[dict[str, Tensor]]:
        with ranks(2) as on_all:
            found = on_all(lambda group: load_rank(group, plan).decoder.tensors())
        finish()
        return found

    made = parts()
    names = sorted(file.name for file in cache.iterdir())
    assert ["-rank-0-of-2-" in names[0], "-rank-1-of-2-" in names[1]] == [True, True]
    assert len(read) == 2
    assert all(same(*pair) for pair in zip(parts(), made, strict=True))
    assert len(read) == 2
    assert not same(loaded(plan), made[0])  # that of one is another file
    assert len(read) == 3


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if not scheme.dense])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kept_model_has_the_bits_that_quantising_made(
    folder: Path, cache: Path, read: list[str], name: str, dtype: str
) -> None:
    plan = planned(folder, WeightSchemes.all(scheme_of(name, 32)), dtype=dtype)
    made = loaded(plan)
    (file,) = cache.iterdir()
    assert file.suffix == ".safetensors"
    assert file.stat().st_mode & 0o777 == 0o600
    assert cache.stat().st_mode & 0o777 == 0o700
    with safe_open(file, "pt") as stored:  # a safetensors file as any
        assert {"0.qkv.values", "1.down.scales", "embed.weight", "0.qkv.bias", "checksums"} <= {*stored.keys()}
    assert len(read) == 1
    assert same(loaded(plan), made)
    assert len(read) == 1
    assert [*cache.iterdir()] == [file]


def test_no_other_model_scheme_or_quantiser_takes_it(
    folder: Path, cache: Path, read: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded(planned(folder))
    others = [
        planned(folder, WeightSchemes.all(SCHEMES["w4a16"])),
        planned(folder, WeightSchemes((SchemeRule(SCHEMES["w8a16"], layers=(0,)),))),
        planned(folder, dtype="bfloat16"),
        planned(write_model(tmp_path / "other", BIASED, seed=1)),
    ]
    for number, plan in enumerate(others, 2):
        loaded(plan)
        assert len(read) == len([*cache.iterdir()]) == number
    monkeypatch.setattr(quantised, "VERSION", quantised.VERSION + 1)
    loaded(planned(folder))
    assert len(read) == 6
    off = planned(folder)
    engine = msgspec.structs.replace(off.config.engine, keep_quantised=False)
    loaded(msgspec.structs.replace(off, config=msgspec.structs.replace(off.config, engine=engine)))
    loaded(planned(folder, WeightSchemes()))
    assert (len(read), len([*cache.iterdir()])) == (8, 6), "nothing is kept unasked, nor of what is not quantised"


def test_a_checkpoint_that_changed_is_refused_with_a_kept_model_too(folder: Path, cache: Path) -> None:
    plan = planned(folder)
    loaded(plan)
    write_model(folder, BIASED, seed=1)
    with pytest.raises(ModelChanged, match=r"model\.safetensors changed since the model was planned"):
        loaded(plan)


def damage(file: Path, at: int) -> None:
    body = bytearray(file.read_bytes())
    body[at] ^= 1
    file.write_bytes(body)


DAMAGE = {
    "one bit of a value": lambda file: damage(file, 9000),
    "one bit of the header": lambda file: damage(file, 40),
    "one bit of the last checksum": lambda file: damage(file, -1),
    "one bit of a checksum": lambda file: damage(file, -21),
    "cut off": lambda file: os.truncate(file, file.stat().st_size - 4),
    "longer": lambda file: os.truncate(file, file.stat().st_size + 4),
    "empty": lambda file: os.truncate(file, 0),
    "zeros at its end": lambda file: (os.truncate(file, 70_000), os.truncate(file, file.stat().st_size + 18_000)),
    "a link to nothing": lambda file: (file.unlink(), file.symlink_to("nowhere")),
    "unreadable": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_noticed_and_made_again(
    folder: Path, cache: Path, read: list[str], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan = planned(folder)
    made = loaded(plan)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    DAMAGE[how](file)
    assert same(loaded(plan), made)
    assert len(read) == 2
    if how != "a link to nothing":  # which is as none
        assert "it is made again" in caplog.text
    if how != "unreadable":
        assert file.read_bytes() == whole
        assert same(loaded(plan), made)
        assert len(read) == 2


def test_a_load_that_does_not_end_leaves_nothing(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(folder)

    def failing(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CpuRunner().load(plan, failing)
    finish()
    assert [*cache.iterdir()] == []


def test_what_is_written_by_another_process_is_left_to_it_and_what_a_dead_one_left_goes(
    folder: Path, cache: Path, read: list[str]
) -> None:
    plan = planned(folder)
    loaded(plan)
    (file,) = cache.iterdir()
    file.unlink()
    part, left = file.with_suffix(".part"), cache / "dead-0123.part"
    left.write_bytes(b"half")
    with open(part, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b"theirs")
        other.flush()
        loaded(plan)
        assert part.read_bytes() == b"theirs"
        assert not file.exists()
    loaded(plan)
    assert [*cache.iterdir()] == [file]


def test_a_file_that_is_removed_or_replaced_is_read_to_its_end(folder: Path, cache: Path) -> None:
    """Two daemons: one makes room while the other starts."""
    plan = planned(folder)
    made = loaded(plan)
    (file,) = cache.iterdir()

    def removing(done: int, total: int) -> None:
        file.unlink(missing_ok=True)

    runner = CpuRunner()
    runner.load(plan, removing)
    assert same(runner.decoder.tensors(), made)


def test_kept_models_take_half_of_the_disk_at_most(
    folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = planned(folder)
    loaded(first)
    (oldest,) = cache.iterdir()
    nbytes = oldest.stat().st_size
    free = [3 * nbytes]
    monkeypatch.setattr(kept_models.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free[0]}))
    loaded(planned(write_model(tmp_path / "second", BIASED, seed=2)))
    assert len([*cache.iterdir()]) == 2, "2 of 4"
    os.utime(oldest, (time.time() + 1000, time.time() + 1000))
    free[0] = 2 * nbytes
    loaded(planned(write_model(tmp_path / "third", BIASED, seed=3)))
    assert len([*cache.iterdir()]) == 2
    assert oldest.exists(), "it was used later than the second"
    free[0] = -nbytes
    before = {*cache.iterdir()}
    loaded(planned(write_model(tmp_path / "fourth", BIASED, seed=4)))
    assert {*cache.iterdir()} == before
    assert "may be used" in caplog.text


def test_a_disk_that_fails_costs_no_start(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int, body: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_file.os, "write", full)
    loaded(planned(folder))
    assert "are not kept" in caplog.text
    assert [*cache.iterdir()] == []
    monkeypatch.undo()
    monkeypatch.setenv("CACHE_DIRECTORY", "/proc/none")
    loaded(planned(folder))
    monkeypatch.setattr(kept_models, "PATIENCE", 0.0)
    gate = threading.Event()
    monkeypatch.setattr(kept_models.KeptFileWriter, "write", lambda self, one: gate.wait(120))
    monkeypatch.setenv("CACHE_DIRECTORY", str(cache.parent))
    runner = CpuRunner()
    runner.load(planned(folder), lambda done, total: None)
    gate.set()
    finish()
    assert "its disk is too slow" in caplog.text
    assert [*cache.iterdir()] == []
