"""What the ranks of several GPUs compute is what one computes: whole models on the kernels of GPUs, interpreted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from covering import ALL
from forked_ranks import ForkedGroup, in_ranks, shared
from lightllmd.architecture.collectives_memory import Regions, largest_message, limits_of
from lightllmd.architecture.ranks import Rank
from lightllmd.config.bounds import DEVICE_HEAD_DIMS
from lightllmd.engine.runners.base import Progress
from lightllmd.engine.runners.gpu import GpuRunner
from lightllmd.engine.runners.loading import load_model
from lightllmd.kernels.collectives import Group
from lightllmd.kernels.devices import fused_kernels
from tiny_models import VARIANTS, Driver, load_on_device, plan_for, write_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forked processes can't use CUDA")

VOCAB = 131
MODELS = {"qwen3": VARIANTS["qwen3"], "olmo2": VARIANTS["olmo2"], "gemma2": VARIANTS["gemma2"]}
CASES = [(name, mode) for name in MODELS for mode in ([], ["triton_w8a8"])] if ALL else [("olmo2", ["triton_w8a8"])]


class RankRunner(GpuRunner):
    """One rank's."""

    group: Group

    def _load_weights(self, progress: Progress) -> None:
        kernels, rank = fused_kernels(self._device, "auto", self.group), Rank(self.group.rank, self.group.ranks)
        self.decoder = load_model(self._plan, kernels, self._device, self._dtype, progress, DEVICE_HEAD_DIMS, rank)


def walk(runner: GpuRunner) -> Tensor:
    """The logits after each of six tokens: five of a prompt, beside another one, and one that is decoded."""
    driver = Driver(runner, scattered=True)
    logits = driver.logits(driver.row(3, [7, 9]), driver.row(0, [3, 14, 15, 92, 65]))
    logits += driver.logits(driver.row(3, [8], 2), driver.row(0, [35], 5))
    return torch.cat(logits)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_logits_are_those_of_one_device(name: str, mode: list[str], tmp_path: Path) -> None:
    model = write_model(tmp_path, MODELS[name] | {"vocab_size": VOCAB, "num_hidden_layers": 2})
    options = {"mode": mode, "slots": 63, "running_max_req_size": 4, "max_req_total_len": 32, "max_req_input_len": 31}
    alone = load_on_device(model, **options)
    truth = walk(alone)
    largest = largest_message(64, alone.decoder.embedding.weight.shape[1], VOCAB, 4)
    memories = [shared(Regions.of(2, limits_of(2, largest)).bytes, dtype=torch.uint8) for _ in range(2)]
    found = [shared(*truth.shape) for _ in range(2)]

    def work(rank: int) -> None:
        torch.set_num_threads(1)  # those of this process did not come along
        runner = RankRunner()
        runner.group = ForkedGroup(rank, memories, largest)
        runner.load(plan_for(model, device="cpu", **options), lambda done, total: None)
        found[rank].copy_(walk(runner))

    in_ranks(2, work)
    assert torch.equal(found[0], found[1])  # every rank samples from the same
    assert (found[0] - truth).abs().max() < 2e-4
