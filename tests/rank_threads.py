"""A group of ranks as threads of one process, in the place of an `LLM`'s child processes: real models, gloo, the ring
and the loop of the ranks that follow."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as distributed

from lightllmd.config.plan import Plan
from lightllmd.engine.ranks.following import Follower
from lightllmd.engine.ranks.guard import PeerGuard
from lightllmd.engine.ranks.leading import LeadingRunner
from lightllmd.engine.ranks.ring import RingReader, RingWriter
from lightllmd.ipc import channel, messages
from lightllmd.kernels.collectives_gloo import GlooGroup
from rank_models import PATIENCE, RankRunner


class ThreadRanks:
    """As `lightllmd.engine.ranks.children.ChildRanks`."""

    def __init__(self, plan: Plan) -> None:
        self._plan, count = plan, plan.ranks
        self._store = distributed.HashStore()
        self._ring = RingWriter(count - 1)
        self._links: list[channel.Channel[messages.Up]] = []
        self.threads: list[threading.Thread] = []
        self.failures: list[BaseException] = []
        for rank in range(1, count):
            link, theirs = channel.pair()
            self._links.append(link)
            thread = threading.Thread(target=self._follow, args=(rank, theirs.detach()), daemon=True)
            self.threads.append(thread)
            thread.start()

    def _runner(self, rank: int) -> RankRunner:
        return RankRunner(GlooGroup(distributed.ProcessGroupGloo(self._store, rank, self._plan.ranks, PATIENCE)))

    def _follow(self, rank: int, fd: int) -> None:
        ring = self._ring
        end = RingReader(
            os.dup(ring.fd), self._plan.ranks - 1, rank - 1, os.dup(ring.wakes[rank - 1]), os.dup(ring.room)
        )
        configure = messages.EngineConfigure(b"", 1, rank, "", "", "", ranks=self._plan.ranks)
        try:
            follower = Follower(channel.inherited(fd), configure, self._plan)
            follower.serve(self._runner(rank), end, PeerGuard({}, print))
        except SystemExit:
            pass
        except BaseException as failure:
            self.failures.append(failure)

    def lead(self, make: Callable[..., Any]) -> LeadingRunner:
        return LeadingRunner(self._runner(0), self._ring, PeerGuard({}, print))

    def check(self) -> None:
        if self.failures:
            raise self.failures[0]

    def failure(self, gone: BaseException) -> BaseException:
        return gone

    def close(self) -> None:
        for link in self._links:
            link.send(messages.Stop())
        for thread in self.threads:
            thread.join(30)
        for link in self._links:
            link.close()
