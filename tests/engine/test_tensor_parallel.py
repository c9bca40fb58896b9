"""What several ranks compute is what one computes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightllmd.engine.runners.cpu import CpuRunner
from rank_models import OnAll, load_rank, ranks
from tiny_models import VARIANTS, Driver, load, write_model

IDS = random.Random(1).choices(range(128), k=40)
TOLERANCE = 1e-4

# A model of each family, with what is hard to share out: 5 KV heads of 2 ranks, 2 of 3, 14 query heads, odd
# vocabularies and intermediate sizes.
UNEVEN: dict[str, Any] = {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 131}
FIVE: dict[str, Any] = {"num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 8, "intermediate_size": 101}
FAMILIES = {
    "llama": UNEVEN,
    "llama, biases": VARIANTS["biases"] | FIVE,
    "llama, tied": VARIANTS["tied"] | {"vocab_size": 130},
    "internlm2": UNEVEN | {"model_type": "internlm2", "bias": True},
    "internlm2, five": FIVE | {"model_type": "internlm2", "bias": False},
    "qwen2": VARIANTS["qwen2"] | UNEVEN,
    "qwen3": VARIANTS["qwen3"] | FIVE,
    "olmo2": VARIANTS["olmo2"] | UNEVEN,
    "olmo2, five": VARIANTS["olmo2"] | FIVE,
    "gemma2": VARIANTS["gemma2"] | UNEVEN,
}


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, OnAll[Any]]]:
    with ExitStack() as held:
        yield {count: held.enter_context(ranks(count)) for count in (2, 3)}


def walk(runner: CpuRunner, poisoned: bool = True) -> Tensor:
    """The logits after each of 32 tokens: whole, in blocks, behind a cached prefix and decoded, in one row and with
    others around it."""
    driver = Driver(runner, scattered=True, poisoned=poisoned)
    logits = driver.logits(driver.row(3, IDS[5:18]), driver.row(0, IDS[:17], prompt_length=29))
    logits += driver.logits(driver.row(3, [7], 1), driver.row(0, IDS[17:29], prompt_length=29))
    for place, token in enumerate(IDS[29:32]):
        logits += driver.logits(driver.row(3, [9], 2 + place), driver.row(0, [token], 1 + place))
    return torch.cat(logits)


def equal(truth: Tensor, found: list[Tensor]) -> None:
    for logits in found:
        assert torch.equal(logits, found[0])  # every rank samples from the same
    difference = (found[0] - truth).abs().max().item()
    assert difference < TOLERANCE, difference


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_one_rank(family: str, tmp_path: Path, groups: dict[int, OnAll[Any]]) -> None:
    model = write_model(tmp_path, FAMILIES[family])
    truth = walk(load(model))
    assert truth.std() > 0.5
    for on_all in groups.values():
        equal(truth, on_all(lambda group: walk(load_rank(group, model))))
