"""Where the processes of a generation find each other. Without ZeroMQ, so that the supervisor may know it."""

from __future__ import annotations

from pathlib import PurePath


def meeting_path(endpoint: str) -> str:
    """The Unix socket at which the other ranks of a generation find rank 0. It is gone as soon as all have come; a rank
    0 that is killed before that leaves it behind."""
    return str(PurePath(endpoint.removeprefix("ipc://")).with_suffix(".ranks"))
