"""What a runner has to know of the group that it is in. No torch."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from lightllmd.architecture.ranks import ALONE, Rank
from lightllmd.engine.ranks.rendezvous import Rendezvous


@dataclass(frozen=True)
class Member:
    """One process of a group."""

    rank: Rank = ALONE
    device: int = 0  # index of its GPU
    rendezvous: Rendezvous | None = None  # None: it is alone, or its back end has no collectives
    listener: socket.socket | None = None  # rank 0's, at the rendezvous

    @property
    def leads(self) -> bool:
        """What its steps make is asked for; the others' is the same."""
        return self.rank.index == 0


SOLE = Member()
