"""Runners whose KV cache is quantised: what is cached is what every later token sees, in whatever way it came there."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightllmd.architecture.kv_layout import KvLayout
from lightllmd.architecture.kv_schemes import KV_SCHEMES
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.runners.gpu import GpuRunner
from tiny_models import BASE, Driver, load, load_on_device, write_model

SCHEMES = [name for name, scheme in KV_SCHEMES.items() if not scheme.dense]
IDS = random.Random(0).choices(range(BASE["vocab_size"]), k=24)
# An element on the border of two levels may fall to either: other shapes of products round otherwise.
LEVEL = 0.05


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32 elements: groups of all sizes."""
    return write_model(tmp_path_factory.mktemp("tiny"), {"head_dim": 32})


def logits(runner: CpuRunner | GpuRunner, *cuts: int) -> Tensor:
    """Behind the last token of IDS, which come in parts that end at `cuts`; slots are scattered."""
    driver = Driver(runner, scattered=True)
    ends = [0, *cuts, len(IDS)]
    return [driver.logits(driver.row(0, IDS[begin:end])) for begin, end in pairwise(ends)][-1][0][-1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_prompts_in_parts_and_tokens_one_by_one_see_the_same_as_a_whole_prompt(scheme: str, model: Path) -> None:
    """So a prompt behind a cached prefix, blocks of splitfuse and what is replayed go on as what they replace."""
    runner = load(model, kv_scheme=scheme)
    whole = logits(runner)
    for cuts in ([7], [1, 9, 10], range(16, len(IDS))):
        torch.testing.assert_close(logits(runner, *cuts), whole, rtol=LEVEL, atol=LEVEL)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_near_those_of_a_dense_cache(scheme: str, model: Path) -> None:
    found, dense = logits(load(model, kv_scheme=scheme), 11), logits(load(model), 11)
    error = (found - dense).norm() / dense.norm()
    assert 1e-5 < error < (0.06 if "int8" in scheme else 0.25)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_cache_is_as_large_as_planned(scheme: str, model: Path) -> None:
    runner = load(model, kv_scheme=scheme, slots=64)
    layout = KvLayout.of(runner.decoder.spec.attention, "float32", scheme)
    assert sum(tensor.nbytes for cache in runner.caches for tensor in cache.tensors) == 64 * layout.slot_bytes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels_of_a_gpu_compute_what_torch_does(scheme: str, model: Path) -> None:
    """A prompt, a part of one behind it, and a token."""
    pytest.importorskip("triton")
    limits = {"running_max_req_size": 2, "max_req_total_len": 32, "max_req_input_len": 31}
    expected = logits(load(model, kv_scheme=scheme, **limits), 13, 23)
    found = logits(load_on_device(model, kv_scheme=scheme, slots=40, **limits), 13, 23)
    torch.testing.assert_close(found.cpu(), expected, rtol=LEVEL, atol=LEVEL)
