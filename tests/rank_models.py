"""The ranks of a tensor-parallel group as threads of one process, each with a runner of its own: gloo between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as distributed

from lightllmd.architecture.ranks import Rank
from lightllmd.engine.runners.base import Progress
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.runners.loading import load_model
from lightllmd.kernels.collectives import Group
from lightllmd.kernels.collectives_gloo import GlooGroup
from lightllmd.kernels.devices import kernels_for
from tiny_models import plan_for

T = TypeVar("T")
OnAll = Callable[[Callable[[Group], T]], list[T]]
PATIENCE = timedelta(seconds=60)
CPU = torch.device("cpu")


@contextmanager
def ranks(count: int) -> Iterator[OnAll[Any]]:
    """Does something on all ranks at once, each in a thread of its own, and returns what each of them returned."""
    store = distributed.HashStore()
    with ThreadPoolExecutor(count) as pool:
        made = [pool.submit(distributed.ProcessGroupGloo, store, rank, count, PATIENCE) for rank in range(count)]
        groups = [GlooGroup(one.result()) for one in made]

        def on_all(act: Callable[[Group], T]) -> list[T]:
            return [one.result() for one in [pool.submit(act, group) for group in groups]]

        yield on_all


class RankRunner(CpuRunner):
    """One rank's."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def _load_weights(self, progress: Progress) -> None:
        dtype, group = getattr(torch, self._plan.data_type), self.group
        kernels, rank = kernels_for(CPU, dtype, group), Rank(group.rank, group.ranks)
        self.decoder = load_model(self._plan, kernels, CPU, dtype, progress, rank=rank)


def load_rank(group: Group, model: Path, **options: Any) -> RankRunner:
    runner = RankRunner(group)
    runner.load(plan_for(model, **options), lambda done, total: None)
    return runner
