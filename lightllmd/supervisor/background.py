"""Work that waits for something (a file, a probe) beside the single-writer loop, whose end is an event of it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lightllmd.supervisor.context import Context

T = TypeVar("T")


@dataclass(frozen=True)
class Ended:
    """Event: some background task has ended; the part that waits for it looks."""


class BackgroundTask(Generic[T]):
    """Begun at once, inside the loop. An owner that drops it cancels it; the end of the daemon cancels all."""

    def __init__(self, context: Context, work: Coroutine[Any, Any, T]) -> None:
        self._task: asyncio.Task[T] = asyncio.get_running_loop().create_task(work)
        context.background_tasks.add(self._task)
        self._task.add_done_callback(context.background_tasks.discard)
        self._task.add_done_callback(lambda _: context.post(Ended()))

    @property
    def done(self) -> bool:
        """Whether it has ended, by whatever."""
        return self._task.done()

    def result(self) -> T:
        """What the work returned; raises what it raised."""
        return self._task.result()

    def cancel(self) -> None:
        """Without effect once it is done."""
        self._task.cancel()
