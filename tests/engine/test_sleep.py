"""Runners that give their memory back and take it again, and the copy of the weights in host memory."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from lightllmd.engine.runners.cpu import TorchRunner
from lightllmd.engine.runners.gpu import DeviceRunner
from lightllmd.errors import WeightsInvalid
from lightllmd.ipc.messages import SamplingParams
from lightllmd.weights import host_copy, staged
from lightllmd.weights.host_copy import HostCopy
from tiny_models import Driver, load, load_on_device, write_model

pytest.importorskip("triton")

IDS = [3, 14, 15, 92, 65, 35, 89]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WRITTEN = {"tie_word_embeddings": True, "attention_bias": True, "num_hidden_layers": 2}


def nothing() -> None:
    pass


def quiet(done: int, total: int) -> None:
    pass


@pytest.fixture(params=["cpu", "device"])
def runner(request: pytest.FixtureRequest, tmp_path: Path) -> TorchRunner | DeviceRunner:
    limits: dict[str, Any] = {"running_max_req_size": 3, "max_req_total_len": 24, "max_req_input_len": 23, "slots": 40}
    made = load if request.param == "cpu" else load_on_device
    loaded = made(write_model(tmp_path, WRITTEN), **limits)
    loaded.prepare(nothing)
    return loaded


def tokens(runner: TorchRunner | DeviceRunner) -> list[list[int]]:
    """Greedy, and drawn with a history."""
    drawn = SamplingParams(do_sample=True, seed=5, presence_penalty=0.5, top_p=0.9)
    driver = Driver(runner, scattered=True)
    made = runner.run(driver.step(driver.row(0, IDS), driver.row(1, IDS[:3], params=drawn, emitted=[4])), nothing)
    found = [made.tokens]
    for place in (1, 2):
        fed = [driver.row(row, [token], place) for row, token in enumerate(found[-1])]
        found.append(runner.run(driver.step(*fed), nothing).tokens)
    return found


def held(runner: TorchRunner | DeviceRunner) -> list[weakref.ref[Tensor]]:
    """What should be gone while it sleeps."""
    found: list[Tensor] = [cache.entries for cache in runner.caches]
    if isinstance(runner, DeviceRunner):
        found += [tensor for _, *both in runner._weights for tensor in both if tensor is not None]
        found += [runner._last, runner._packer._table, runner._sampler._counts, runner.decoder.rope._exponents]
    return [weakref.ref(tensor) for tensor in found]


@pytest.mark.parametrize("stage", [True, False], ids=["staged", "from files"])
def test_who_slept_and_woke_computes_the_same_tokens(
    runner: TorchRunner | DeviceRunner, stage: bool, tmp_path: Path
) -> None:
    expected = tokens(runner)
    for _ in range(2):
        if stage:
            runner.stage()
            assert tokens(runner) == expected, "steps go on beside the copying"
        old = held(runner)
        runner.release(quiet)
        assert [reference() for reference in old if reference() is not None] == []
        assert runner.memory_stats()["memory_asleep"] >= 0
        if stage:  # no file is needed
            (tmp_path / "model.safetensors").rename(tmp_path / "away")
        runner.restore(quiet)
        runner.prepare(nothing)
        assert tokens(runner) == expected
        assert runner.memory_stats().keys().isdisjoint({"memory_asleep", "staged_bytes"})
        if stage:
            (tmp_path / "away").rename(tmp_path / "model.safetensors")


@pytest.mark.parametrize("runner", ["device"], indirect=True)
def test_staging_tells_how_far_it_is_and_leaves_no_thread(runner: DeviceRunner) -> None:
    before = threading.active_count()
    assert "staged_bytes" not in runner.memory_stats()
    size = sum(tensor.nbytes for _, *both in runner._weights for tensor in both if tensor is not None)
    runner.stage()
    seen: list[tuple[int, int]] = []
    assert runner._copy is not None
    assert runner._copy.wait(lambda *at: seen.append(at))
    assert seen[-1] == (size, size)
    stats = runner.memory_stats()
    assert (stats["staged_bytes"], stats["staged_total"]) == (size, size)
    copy = runner._copy
    runner.stage()
    assert runner._copy is copy, "once is enough"
    runner.unstage()
    assert "staged_bytes" not in runner.memory_stats()
    assert threading.active_count() == before


@pytest.mark.parametrize("runner", ["device"], indirect=True)
def test_too_little_host_memory_is_told_and_the_files_are_read_again(
    runner: DeviceRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(runner)
    size = sum(tensor.nbytes for _, *both in runner._weights for tensor in both if tensor is not None)
    monkeypatch.setattr(host_copy, "free_memory", lambda: int(size * 1.05))
    runner.stage()
    assert runner._copy is not None
    assert not runner._copy.wait(quiet)
    assert runner.memory_stats()["staged_bytes"] == -1
    runner.release(quiet)
    assert runner.memory_stats()["staged_bytes"] == -1
    runner.restore(quiet)
    runner.prepare(nothing)
    assert tokens(runner) == expected
    monkeypatch.undo()
    runner.stage()
    assert runner._copy is not None
    assert runner._copy.wait(quiet), "asked again, there may be more"


@pytest.mark.parametrize("runner", ["device"], indirect=True)
def test_weights_that_are_gone_while_it_sleeps_are_told(runner: DeviceRunner, tmp_path: Path) -> None:
    runner.release(quiet)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsInvalid, match=r"model\.safetensors: can't be read: No such file"):
        runner.restore(quiet)


@pytest.mark.parametrize("runner", ["cpu"], indirect=True)
def test_a_cpus_weights_stay_where_they_are_when_they_are_staged(runner: TorchRunner) -> None:
    embedding = runner.decoder.tensors()["embed"]
    runner.stage()
    runner.release(quiet)
    runner.restore(quiet)
    assert runner.decoder.tensors()["embed"] is embedding
    runner.release(quiet)
    assert not hasattr(runner, "decoder")


def weights(sizes: list[int], dtype: torch.dtype) -> list[tuple[str, Tensor, Tensor | None]]:
    made = torch.Generator(DEVICE).manual_seed(0)
    values = [torch.rand(size, 3, generator=made, device=DEVICE).to(dtype) for size in sizes]
    return [(str(index), value, value[:, 0].clone() if index % 2 else None) for index, value in enumerate(values)]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (staged, host_copy):
        monkeypatch.setattr(module, "PIECE_BYTES", 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_back_is_what_went(small_pieces: None, dtype: torch.dtype) -> None:
    there = weights([1, 7, 100, 33, 512], dtype)
    copy = HostCopy(there, DEVICE)
    assert copy.wait(quiet)
    seen: list[tuple[int, int]] = []
    back = list(copy.stream(lambda *at: seen.append(at)))
    assert seen[-1] == (copy.total, copy.total)
    for (key, weight, bias), (other_key, other, other_bias) in zip(there, back, strict=True):
        assert key == other_key
        assert torch.equal(weight, other)
        assert weight.data_ptr() != other.data_ptr()
        assert (bias is None) == (other_bias is None)
        assert bias is None or torch.equal(bias, other_bias)


def test_a_copy_keeps_nothing_of_the_device_and_is_given_back_as_a_whole() -> None:
    process = psutil.Process(os.getpid())
    there = weights([4 << 20], torch.float32)  # 48 MiB
    gone = weakref.ref(there[0][1])
    copy = HostCopy(there, DEVICE)
    assert copy.wait(quiet)
    there.clear()
    gc.collect()
    assert gone() is None
    before = process.memory_info().rss
    del copy
    gc.collect()
    assert before - process.memory_info().rss > 40 << 20


def test_a_copy_that_is_given_up_ends_soon(small_pieces: None) -> None:
    before = threading.active_count()
    copy = HostCopy(weights([1 << 20], torch.float32), DEVICE)
    copy.give_up()
    assert not copy.whole
    assert copy.done < copy.total
    assert threading.active_count() == before
