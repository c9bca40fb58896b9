"""Work that reads files, in threads that no caller has to wait for: a network file system may answer late, or never."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from lightllmd.errors import TryAgain

T = TypeVar("T")
TIMEOUT = 20.0  # seconds
MOST = 8  # threads at a time, those that hang included


class FileThreads(Executor):
    """One daemon thread for each piece of work: one that hangs holds up neither others nor the end of the process."""

    def __init__(self) -> None:
        self._room = threading.BoundedSemaphore(MOST)

    async def run(self, what: str, work: Callable[..., T], *arguments: Any, timeout: float = TIMEOUT) -> T:
        """What `work` returns. Raises what it raises, TryAgain where it takes too long or too much hangs already."""
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.get_running_loop().run_in_executor(self, work, *arguments)
        except TimeoutError:
            raise TryAgain(f"{what} takes longer than {timeout:g} s: is its file system there?") from None

    def submit(self, work: Callable[..., T], /, *arguments: Any, **named: Any) -> Future[T]:
        """As `Executor.submit`. Raises TryAgain where all threads hang."""
        if not self._room.acquire(blocking=False):
            raise TryAgain(f"{MOST} files are being read already, and hang")
        future: Future[T] = Future()
        threading.Thread(target=self._run, args=(future, work, arguments, named), name="files", daemon=True).start()
        return future

    def _run(
        self, future: Future[T], work: Callable[..., T], arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        if future.set_running_or_notify_cancel():
            try:
                result = work(*arguments, **named)
            except BaseException as failure:
                future.set_exception(failure)
            else:
                future.set_result(result)
        self._room.release()
