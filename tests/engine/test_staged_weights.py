"""Weights on their way to a GPU, through a ring of buffers that several threads fill; without one, to a CPU."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from leftovers import no_new_descriptors, no_new_threads
from lightllmd.architecture.families import architecture_of
from lightllmd.architecture.family import Architecture
from lightllmd.errors import WeightsInvalid
from lightllmd.weights import place, staged
from lightllmd.weights.safetensors import SafetensorsCheckpoint
from lightllmd.weights.verify import verify
from tiny_models import BASE, write_model, write_tensors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHANGES = {"attention_bias": True, "mlp_bias": True}


def opened(folder: Path) -> tuple[SafetensorsCheckpoint, Architecture]:
    checkpoint = SafetensorsCheckpoint(sorted(folder.glob("*.safetensors")))
    return checkpoint, architecture_of("llama", BASE | CHANGES)


@pytest.mark.parametrize("piece", [64, 4096, 8 << 20])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_what_arrives_is_what_reading_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, stored: torch.dtype, wanted: torch.dtype
) -> None:
    monkeypatch.setattr(staged, "PIECE_BYTES", piece)
    folder = write_model(tmp_path, CHANGES)
    write_tensors(folder, {name: tensor.to(stored) for name, tensor in load_file(folder / "model.safetensors").items()})
    checkpoint, architecture = opened(folder)
    seen: list[tuple[int, int]] = []
    expected = list(place.stream(checkpoint, architecture.weights, wanted, torch.device("cpu"), lambda *at: None))
    found = list(staged.stream(checkpoint, architecture.weights, wanted, DEVICE, lambda *at: seen.append(at)))
    assert [one.spec for one in found] == [one.spec for one in expected]
    for (_, weight, bias), (_, other, other_bias) in zip(found, expected, strict=True):
        assert weight.dtype == wanted
        assert torch.equal(weight.cpu(), other)
        assert (bias is None) == (other_bias is None)
        assert bias is None or torch.equal(bias.cpu(), other_bias)
    held = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert seen[-1] == (held, held)
    assert seen == sorted(seen)


def test_a_tensor_is_whole_when_it_is_yielded_and_the_next_are_on_their_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged, "PIECE_BYTES", 1024)
    checkpoint, architecture = opened(write_model(tmp_path, CHANGES, shards=3))
    sizes = [sum(checkpoint.tensors[part.name].nbytes for part in one.stored) for one in architecture.weights]
    done = 0

    def progress(at: int, total: int) -> None:
        nonlocal done
        done = at

    for count, _ in enumerate(staged.stream(checkpoint, architecture.weights, torch.float32, DEVICE, progress), 1):
        assert done >= sum(sizes[:count])
    assert done == sum(sizes)


def test_weights_that_pass_share_memory_and_are_whole_when_they_are_yielded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged, "PIECE_BYTES", 256)
    checkpoint, architecture = opened(write_model(tmp_path, CHANGES))
    passing = [weight for weight in architecture.weights if weight.quantisable]
    cpu, quiet = torch.device("cpu"), lambda *at: None
    expected = {
        one.spec.key: one.tensor for one in place.stream(checkpoint, architecture.weights, torch.float32, cpu, quiet)
    }
    for stream in (staged.stream, place.stream):
        found, rooms = dict[str, torch.Tensor](), set()
        for spec, tensor, _ in stream(checkpoint, architecture.weights, torch.float32, DEVICE, quiet, passing):
            assert isinstance(tensor, torch.Tensor)
            found[spec.key] = tensor.clone() if spec.quantisable else tensor
            rooms |= {tensor.data_ptr()} if spec.quantisable else set()
        assert len(rooms) == 1
        for key, tensor in found.items():
            assert torch.equal(tensor.cpu(), expected[key])


def test_a_type_that_is_no_weights_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_model(tmp_path, CHANGES)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int64)
    write_tensors(folder, tensors)
    checkpoint, architecture = opened(folder)
    with pytest.raises(WeightsInvalid, match=r"model\.norm\.weight is of type I64"):
        verify(architecture, checkpoint.tensors, checkpoint.readable, str(folder))


def test_a_load_that_is_given_up_leaves_no_thread_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged, "PIECE_BYTES", 1024)
    checkpoint, architecture = opened(write_model(tmp_path, CHANGES))
    before = set(threading.enumerate())
    with no_new_threads(), no_new_descriptors():
        stream = staged.stream(checkpoint, architecture.weights, torch.float32, DEVICE, lambda *at: None)
        next(stream)
        assert set(threading.enumerate()) - before
        stream.close()
