"""The ranks of a tensor-parallel group as threads of one process, each with a runner of its own: gloo between them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor

from lightllmd.architecture.ranks import Rank
from lightllmd.config.plan import Plan
from lightllmd.engine.runners.base import Progress
from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.engine.runners.loading import load_model
from lightllmd.kernels.collectives import Group
from lightllmd.kernels.collectives_gloo import GlooGroup
from lightllmd.kernels.devices import kernels_for

T = TypeVar("T")
OnAll = Callable[[Callable[[Group], T]], list[T]]
PATIENCE = timedelta(seconds=60)
CPU = torch.device("cpu")


@contextmanager
def ranks(count: int, *, in_turns: bool = False) -> Iterator[OnAll[Any]]:
    """Does something on all ranks at once, each in a thread of its own, and returns what each of them returned.
    `in_turns`: one after the other from one collective to the next, as Triton's interpreter has to be run."""
    store, turn = distributed.HashStore(), threading.Lock()
    with ThreadPoolExecutor(count) as pool:
        made = [pool.submit(distributed.ProcessGroupGloo, store, rank, count, PATIENCE) for rank in range(count)]
        groups = [GlooGroup(InTurns(one.result(), turn) if in_turns else one.result()) for one in made]

        def on_all(act: Callable[[Group], T]) -> list[T]:
            def acted(group: Group) -> T:
                if not in_turns:
                    return act(group)
                with turn:
                    return act(group)

            return [one.result() for one in [pool.submit(acted, group) for group in groups]]

        yield on_all


class InTurns:
    """A process group whose ranks hold a lock but for the time of a collective."""

    def __init__(self, processes: Any, turn: threading.Lock) -> None:
        self._processes, self._turn = processes, turn
        self.rank, self.size = processes.rank, processes.size

    def _allgather_base(self, out: Tensor, x: Tensor) -> InTurns:
        self._turn.release()
        try:
            self._processes._allgather_base(out, x).wait()
        finally:
            self._turn.acquire()
        return self

    def wait(self) -> None:
        """It has been done."""


class RankRunner(CpuRunner):
    """One rank's."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def _load_weights(self, progress: Progress) -> None:
        dtype, group = getattr(torch, self._plan.data_type), self.group
        kernels, rank = kernels_for(CPU, dtype, group), Rank(group.rank, group.ranks)
        self.decoder = load_model(self._plan, kernels, CPU, dtype, progress, rank=rank)


def load_rank(group: Group | None, plan: Plan) -> CpuRunner:
    """A runner that has loaded a rank's part; None: all of it."""
    runner = CpuRunner() if group is None else RankRunner(group)
    runner.load(plan, lambda done, total: None)
    return runner
