"""What the ranks of several GPUs compute is what one computes: whole models on the kernels of GPUs, interpreted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

pytest.importorskip("triton")

from covering import ALL
from forked_ranks import IN_FRESH_PROCESS, ForkedGroup, in_ranks, shared
from lightllmd.architecture.collectives_memory import Regions, largest_message, limits_of
from lightllmd.architecture.ranks import Rank
from lightllmd.architecture.schemes import SCHEMES
from lightllmd.architecture.weight_schemes import WeightSchemes
from lightllmd.engine.ranks.member import Member
from lightllmd.engine.runners.gpu import GpuRunner
from lightllmd.kernels.collectives import Group
from tiny_models import VARIANTS, Driver, load_on_device, plan_for, write_model

pytestmark = IN_FRESH_PROCESS

VOCAB = 131
MODELS = {"qwen3": VARIANTS["qwen3"], "olmo2": VARIANTS["olmo2"], "gemma2": VARIANTS["gemma2"]}
CASES = [(name, scheme) for name in MODELS for scheme in ("dense", "w8a8", "w4a16")] if ALL else [("olmo2", "w8a8")]


def rank_of(group: Group) -> GpuRunner:
    """One rank's runner, which has loaded nothing."""
    runner = GpuRunner(Member(Rank(group.rank, group.ranks)))
    runner._group = group
    return runner


class ToldGroup(Group):
    """Writes down what it is asked for, and answers as if the other ranks had zeros."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.told: list[tuple[object, ...]] = []

    def sum_(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self.told.append(("sum", x.shape, x.dtype, residual is not None))
        return x if residual is None else residual.add_(x)

    def sum_small(self, x: Tensor) -> Tensor:
        self.told.append(("sum_small", x.shape, x.dtype))
        return x

    def max_(self, x: Tensor) -> Tensor:
        self.told.append(("max", x.shape, x.dtype))
        return x

    def gather_columns(self, part: Tensor, columns: int) -> Tensor:
        self.told.append(("gather", part.shape, part.dtype, columns))
        return functional.pad(part, (0, columns - part.shape[1]))


def walk(runner: GpuRunner) -> Tensor:
    """The logits after each of six tokens: five of a prompt, beside another one, and one that is decoded."""
    driver = Driver(runner, scattered=True)
    logits = driver.logits(driver.row(3, [7, 9]), driver.row(0, [3, 14, 15, 92, 65]))
    logits += driver.logits(driver.row(3, [8], 2), driver.row(0, [35], 5))
    return torch.cat(logits)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_logits_are_those_of_one_device(name: str, scheme: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, MODELS[name] | {"vocab_size": VOCAB, "num_hidden_layers": 2})
    options: dict[str, Any] = {"slots": 63, "running_max_req_size": 4, "max_req_total_len": 32, "max_req_input_len": 31}
    options["schemes"] = WeightSchemes.all(SCHEMES[scheme])
    alone = load_on_device(model, **options)
    truth = walk(alone)
    largest = largest_message(64, alone.decoder.embedding.weight.shape[1], VOCAB, 4)
    memories = [shared(Regions.of(2, limits_of(2, largest)).bytes, dtype=torch.uint8) for _ in range(2)]
    found = [shared(*truth.shape) for _ in range(2)]

    def work(rank: int) -> None:
        torch.set_num_threads(1)  # those of this process did not come along
        runner = rank_of(ForkedGroup(rank, memories, largest))
        runner.load(plan_for(model, device="cpu", **options), lambda done, total: None)
        found[rank].copy_(walk(runner))

    in_ranks(2, work)
    assert torch.equal(found[0], found[1])  # every rank samples from the same
    assert (found[0] - truth).abs().max() < 2e-4


def test_all_ranks_ask_for_the_same_in_the_same_order(tmp_path: Path) -> None:
    """In every kind of step: those that are captured, and the worst ones that run before the engine is ready. A rank
    that asked for another thing than the others would wait for ever."""
    uneven = {"num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 16, "intermediate_size": 101}
    model = write_model(tmp_path, MODELS["olmo2"] | uneven | {"vocab_size": VOCAB, "num_hidden_layers": 1})
    limits = {"running_max_req_size": 1, "max_req_total_len": 12, "max_req_input_len": 11, "slots": 20}
    scheme = "w8a8" if ALL else "dense"
    plan = plan_for(model, device="cpu", schemes=WeightSchemes.all(SCHEMES[scheme]), **limits)
    told = []
    for rank in range(2):
        group = ToldGroup(rank, 2)
        runner = rank_of(group)
        runner.load(plan, lambda done, total: None)
        runner.prepare(lambda: None)
        told.append(group.told)
    assert told[0] == told[1]
    assert {what for what, *_ in told[0]} == {"sum", "sum_small", "gather", *(["max"] if ALL else [])}
