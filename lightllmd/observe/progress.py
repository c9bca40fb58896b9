"""Bars on a terminal for what a person waits for. Drawn by the working thread itself, a few times a second."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

INTERVAL = 0.1  # seconds between two pictures


class Bar:
    """A context manager; nothing is drawn unless `shown` and standard error is a terminal."""

    def __init__(self, title: str, total: float, shown: bool) -> None:
        self._progress: Progress | None = None
        self._next = 0.0  # monotonic seconds
        if not (shown and sys.stderr.isatty()):
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns: list[ProgressColumn] = [
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[said]}"),
        ]
        self._progress = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
        self._task = self._progress.add_task(title, total=total, said="")

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.refresh()
            self._progress.stop()

    def draw(self, done: float, total: float, said: str) -> None:
        """`said` stands behind the bar."""
        if self._progress is None:
            return
        self._progress.update(self._task, completed=done, total=total, said=said)
        if (now := time.monotonic()) >= self._next:
            self._next = now + INTERVAL
            self._progress.refresh()


class LoadBar(Bar):
    """Weights being loaded."""

    def __init__(self, name: str, shown: bool) -> None:
        super().__init__(f"loading {name}", 1, shown)

    def update(self, done: int, total: int) -> None:
        """Bytes."""
        self.draw(done, total, f"{done / 1e9:.2f} of {total / 1e9:.2f} GB")


class RequestBar(Bar):
    """Requests being generated: those done, and the rate of all tokens so far."""

    def __init__(self, requests: int, shown: bool) -> None:
        super().__init__("generating", requests, shown)
        self._requests = requests
        self._begun = time.monotonic()
        self._done = self._tokens = 0

    def advance(self, done: int, tokens: int) -> None:
        """`done` more requests are complete, `tokens` more were generated."""
        self._done += done
        self._tokens += tokens
        if self._progress is not None:
            rate = self._tokens / max(time.monotonic() - self._begun, 1e-9)
            self.draw(self._done, self._requests, f"{self._done} of {self._requests}, {rate:,.0f} tokens/s")
