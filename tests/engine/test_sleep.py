"""Runners that give their memory back and take it again, and the copy of the weights in host memory."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from leftovers import no_new_threads
from lightllmd.architecture.cpu_storage import cpu_nbytes
from lightllmd.architecture.families import architecture_of
from lightllmd.architecture.schemes import SCHEMES, Scheme, scheme_of
from lightllmd.architecture.storage import weight_bytes
from lightllmd.architecture.weight_schemes import WeightSchemes
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.runners.gpu import GpuRunner
from lightllmd.errors import WeightsInvalid
from lightllmd.ipc.messages import SamplingParams
from lightllmd.kernels.devices import fused_kernels
from lightllmd.weights import host_copy, staged
from lightllmd.weights.host_copy import HostCopy, free_storage
from long_run import LONG
from tiny_models import BASE, Driver, load, load_on_device, write_model

pytest.importorskip("triton")

IDS = [3, 14, 15, 92, 65, 35, 89]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WRITTEN = {"tie_word_embeddings": True, "attention_bias": True, "num_hidden_layers": 2}


def nothing() -> None:
    pass


def quiet(done: int, total: int) -> None:
    pass


@pytest.fixture(params=["cpu", "device"])
def runner(request: pytest.FixtureRequest, tmp_path: Path) -> CpuRunner | GpuRunner:
    limits: dict[str, Any] = {"running_max_req_size": 3, "max_req_total_len": 24, "max_req_input_len": 23, "slots": 40}
    made = load if request.param == "cpu" else load_on_device
    loaded = made(write_model(tmp_path, WRITTEN), **limits)
    loaded.prepare(nothing)
    return loaded


QUANTISED = [name for name, scheme in SCHEMES.items() if not scheme.dense]
# In the interpreter a device's steps take seconds; its linears are tried for all schemes below.
ON_A_DEVICE = QUANTISED if LONG or DEVICE.type == "cuda" else []


@pytest.mark.parametrize(
    ("where", "name"), [*(("cpu", name) for name in QUANTISED), *(("device", name) for name in ON_A_DEVICE)]
)
def test_a_quantised_model_takes_what_was_planned_and_gives_it_back(tmp_path: Path, where: str, name: str) -> None:
    """Each scheme: values, scales and zeros are staged, freed and filled again in place."""
    schemes = WeightSchemes.all(scheme_of(name, 32))
    limits = {"running_max_req_size": 3, "max_req_total_len": 24, "max_req_input_len": 23, "slots": 40}
    made: Callable[..., CpuRunner | GpuRunner] = load if where == "cpu" else load_on_device
    runner = made(write_model(tmp_path, WRITTEN), schemes=schemes, dtype="float32", **limits)
    runner.prepare(nothing)
    expected = tokens(runner)
    held = runner.decoder.tensors()
    on_device = {key: tensor for key, tensor in held.items() if not key.startswith("head")}  # a CPU packs a tied one
    nbytes = cpu_nbytes if where == "cpu" else Scheme.nbytes
    planned = weight_bytes(architecture_of("llama", BASE | WRITTEN).weights, 4, schemes, nbytes=nbytes)
    assert sum(tensor.nbytes for tensor in on_device.values()) == pytest.approx(planned, rel=0.04)  # rows of 64
    runner.stage()
    assert runner._staged is not None
    assert runner._staged.wait(quiet)
    assert runner._staged.total == sum(tensor.nbytes for tensor in held.values())
    runner.release(quiet)
    if isinstance(runner, GpuRunner):
        assert {tensor.untyped_storage().nbytes() for tensor in held.values()} == {0}
    (tmp_path / "model.safetensors").unlink()  # no file is needed
    runner.restore(quiet)
    runner.prepare(nothing)
    assert tokens(runner) == expected


# Those of ours, and what checkpoints have beside them.
STORED = {name: scheme_of(name, 32) for name in QUANTISED} | {
    "ordered": replace(SCHEMES["w4a16"], group=32, ordered=True),
    "static": replace(SCHEMES["fp8"], static=True),
    "zeros in 8 bits": replace(SCHEMES["w8a16"], values="uint8", symmetric=False, group=32, scales=""),
}


@pytest.mark.parametrize("name", STORED)
def test_a_devices_linear_gives_back_all_that_it_holds_and_takes_it_again(name: str) -> None:
    scheme, shape = STORED[name], (48, 96)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    linear = fused_kernels(DEVICE).linear("down", weight, None, scheme)
    x = torch.randn((3, 96), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected, held = linear(x), linear.tensors()
    assert sum(tensor.nbytes for tensor in held.values()) == pytest.approx(scheme.nbytes(shape, 4), rel=0.02)
    copy = HostCopy(held, DEVICE)
    assert copy.wait(quiet)
    free_storage(held)
    assert sum(tensor.untyped_storage().nbytes() for tensor in held.values()) == 0
    copy.restore(held, quiet)
    assert torch.equal(linear(x), expected)


def tokens(runner: CpuRunner | GpuRunner) -> list[list[int]]:
    """Greedy, and drawn with a history."""
    drawn = SamplingParams(do_sample=True, seed=5, presence_penalty=0.5, top_p=0.9)
    driver = Driver(runner, scattered=True)
    made = runner.run(driver.step(driver.row(0, IDS), driver.row(1, IDS[:3], params=drawn, emitted=[4])), nothing)
    found = [made.tokens]
    for place in (1, 2):
        fed = [driver.row(row, [token], place) for row, token in enumerate(found[-1])]
        found.append(runner.run(driver.step(*fed), nothing).tokens)
    return found


def held(runner: CpuRunner | GpuRunner) -> list[weakref.ref[Tensor]]:
    """What should be gone while it sleeps."""
    found: list[Tensor] = [tensor for cache in runner.caches for tensor in cache.tensors]
    if isinstance(runner, GpuRunner):
        found += [runner._last, runner._packer._table, runner._sampler._counts]
    return [weakref.ref(tensor) for tensor in found]


@pytest.mark.parametrize("stage", [True, False], ids=["staged", "from files"])
def test_who_slept_and_woke_computes_the_same_tokens(
    runner: CpuRunner | GpuRunner, stage: bool, tmp_path: Path
) -> None:
    expected = tokens(runner)
    for _ in range(2):
        if stage:
            runner.stage()
            assert tokens(runner) == expected, "steps go on beside the copying"
        old, weights = held(runner), runner.decoder.tensors()
        runner.release(quiet)
        assert [reference() for reference in old if reference() is not None] == []
        if isinstance(runner, GpuRunner) and stage:
            assert {tensor.untyped_storage().nbytes() for tensor in weights.values()} == {0}
        del weights
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
def test_staging_tells_how_far_it_is_and_leaves_no_thread(runner: GpuRunner) -> None:
    assert "staged_bytes" not in runner.memory_stats()
    size = sum(tensor.nbytes for tensor in runner.decoder.tensors().values())
    with no_new_threads():
        runner.stage()
        seen: list[tuple[int, int]] = []
        assert runner._staged is not None
        assert runner._staged.wait(lambda *at: seen.append(at))
        assert seen[-1] == (size, size)
        stats = runner.memory_stats()
        assert (stats["staged_bytes"], stats["staged_total"]) == (size, size)
        copy = runner._staged
        runner.stage()
        assert runner._staged is copy, "once is enough"
        runner.unstage()
    assert "staged_bytes" not in runner.memory_stats()


@pytest.mark.parametrize("runner", ["device"], indirect=True)
def test_too_little_host_memory_is_told_and_the_files_are_read_again(
    runner: GpuRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(runner)
    size = sum(tensor.nbytes for tensor in runner.decoder.tensors().values())
    monkeypatch.setattr(host_copy, "free_memory", lambda: int(size * 1.05))
    runner.stage()
    assert runner._staged is not None
    assert not runner._staged.wait(quiet)
    assert runner.memory_stats()["staged_bytes"] == -1
    runner.release(quiet)
    assert runner.memory_stats()["staged_bytes"] == -1
    runner.restore(quiet)
    runner.prepare(nothing)
    assert tokens(runner) == expected
    monkeypatch.undo()
    runner.stage()
    assert runner._staged is not None
    assert runner._staged.wait(quiet), "asked again, there may be more"


@pytest.mark.parametrize("runner", ["device"], indirect=True)
def test_weights_that_are_gone_while_it_sleeps_are_told(runner: GpuRunner, tmp_path: Path) -> None:
    runner.release(quiet)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsInvalid, match=r"model\.safetensors: can't be read: No such file"):
        runner.restore(quiet)


@pytest.mark.parametrize("runner", ["cpu"], indirect=True)
def test_a_cpus_weights_stay_where_they_are_when_they_are_staged(runner: CpuRunner) -> None:
    embedding = runner.decoder.tensors()["embed"]
    runner.stage()
    runner.release(quiet)
    runner.restore(quiet)
    assert runner.decoder.tensors()["embed"] is embedding
    runner.release(quiet)
    assert not hasattr(runner, "decoder")


def weights(sizes: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    made = torch.Generator(DEVICE).manual_seed(0)
    values = [torch.rand(size, 3, generator=made, device=DEVICE) for size in sizes]
    return {str(index): (100 * value).to(dtype) for index, value in enumerate(values)}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (staged, host_copy):
        monkeypatch.setattr(module, "PIECE_BYTES", 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_what_comes_back_is_what_went(small_pieces: None, dtype: torch.dtype) -> None:
    """Whatever its scheme is: a quantised model stages its quantised bytes."""
    there = weights([1, 7, 100, 33, 512], dtype)
    expected = {name: tensor.clone() for name, tensor in there.items()}
    copy = HostCopy(there, DEVICE)
    assert copy.wait(quiet)
    assert copy.total == sum(tensor.nbytes for tensor in there.values())
    free_storage(there)
    seen: list[tuple[int, int]] = []
    copy.restore(there, lambda *at: seen.append(at))
    assert seen[-1] == (copy.total, copy.total)
    for name, tensor in there.items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8))


def test_a_copy_keeps_nothing_of_the_device_and_is_given_back_as_a_whole() -> None:
    process = psutil.Process(os.getpid())
    there = weights([4 << 20], torch.float32)  # 48 MiB
    gone = weakref.ref(there["0"])
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
    with no_new_threads():
        copy = HostCopy(weights([1 << 20], torch.float32), DEVICE)
        copy.cancel()
    assert not copy.whole
    assert copy.done < copy.total
