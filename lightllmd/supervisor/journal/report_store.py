"""A bounded number of small files, numbered, each written whole or not at all by a thread of its own."""

from __future__ import annotations

import asyncio
import os
import queue
import re
import threading
from collections.abc import Callable
from pathlib import Path

LARGEST = 4 << 20  # bytes of a file that is read back
_DEPTH = 100  # files that may wait for a slow disk


class ReportStore:
    """`<number>.json` in a directory that is ours alone (0700, files 0600); beyond `keep` of them the oldest go.

    Belongs to the loop's thread, which never waits for the disk. Faults of the disk are told to `complain`, in the
    loop's thread. Raises OSError where the directory can't be had.
    """

    def __init__(self, directory: Path, keep: int, complain: Callable[[str], None]) -> None:
        self.directory, self.complain = directory, complain
        self._keep = keep
        self._queue: queue.Queue[tuple[int, bytes] | None] = queue.Queue(_DEPTH)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        directory.mkdir(mode=0o700, exist_ok=True)
        directory.chmod(0o700)

    def load(self) -> list[tuple[int, bytes]]:
        """What is there, oldest first, at most `keep`. Called once, before the loop runs."""
        for left_over in self.directory.glob(".*.partial"):
            left_over.unlink(missing_ok=True)
        found = []
        for number in self._numbers()[-self._keep :]:
            try:
                with self._path(number).open("rb") as file:
                    found.append((number, file.read(LARGEST)))
            except OSError as refused:
                self.complain(f"{self._path(number)}: {refused.strerror}")
                found.append((number, b""))
        return found

    def put(self, number: int, body: bytes) -> None:
        """Queues `body` to be written as `<number>.json`; complains and drops it where the disk is too slow."""
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._run, name="reports", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait((number, body))
        except queue.Full:
            self.complain(f"{self._path(number)} is not written: the disk is too slow")

    def close(self, timeout: float = 1.0) -> None:
        """Waits until all is written, but not for ever."""
        if self._thread is None:
            return
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    # --- the thread --------------------------------------------------------------------------------------------
    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            number, body = item
            try:
                self._write(number, body)
                for outdated in self._numbers()[: -self._keep]:
                    self._path(outdated).unlink(missing_ok=True)
            except OSError as refused:
                self._complain(f"{self._path(number)} can't be written: {refused.strerror}")

    def _write(self, number: int, body: bytes) -> None:
        partial = self.directory / f".{number}.partial"
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            view = memoryview(body)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        partial.rename(self._path(number))

    def _complain(self, message: str) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self.complain, message)
        except RuntimeError:
            pass  # the loop is over: the complaint has no reader

    def _numbers(self) -> list[int]:
        """Of the files there, ascending."""
        names = (re.fullmatch(r"(\d{1,15})\.json", path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def _path(self, number: int) -> Path:
        return self.directory / f"{number}.json"
