"""Files whose content is in force without a reload: looked at about once a second, taken up where they can be used."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from lightllmd.errors import LightllmdError
from lightllmd.supervisor.background import BackgroundTask
from lightllmd.supervisor.context import Context

T = TypeVar("T")
Stats = list[tuple[int, int, int] | None]  # of each file; None: it isn't there
# Looks at which files have to be broken until that is told: several, or one that is written in place, are not replaced
# in one moment.
_LOOKS = 2


class Unusable(Exception):
    """The files can't be used; the message says why."""


@dataclass(frozen=True)
class _Found(Generic[T]):
    """By one look at the files of these names."""

    files: tuple[str, ...]
    stats: Stats | None
    content: T | None  # None: they can't be used, and `fault` says why
    fault: str = ""


class WatchedFiles(ABC, Generic[T]):
    """Belongs to the single-writer loop. `kind` and `what`: of events about them, such as "tls", "the certificate"."""

    settles = False  # a file that is half written may look like a whole one: taken up when two looks have found it so

    def __init__(self, context: Context, kind: str, what: str) -> None:
        self._context = context
        self._kind, self._what = kind, what
        self._look: BackgroundTask[_Found[T] | None] | None = None
        self._seen: object = None  # names and stats of the files that are in force
        self._settling: object = None  # names and stats of those that a look has found and that are not yet taken up
        self._broken = 0  # looks that found them so
        self.fault = ""  # why the files can't be used; what they held before is in force

    @property
    @abstractmethod
    def _files(self) -> tuple[str, ...]:
        """Their names in the configuration in force; empty where there is nothing to look at."""

    @abstractmethod
    def _read(self, files: tuple[str, ...]) -> T:
        """In a thread. Raises Unusable."""

    @property
    def _in_force(self) -> bool:
        """What was taken up is still in force: no reload has put something else there."""
        return True

    @abstractmethod
    def _take(self, content: T) -> None:
        """Puts it in force."""

    def _tell_fault(self) -> None:
        """`fault` has another text."""

    def look(self) -> None:
        """Begins a look, in a thread; one that hangs holds up this alone."""
        files = self._files
        if self._look is None and files:
            known = self._in_force and not self._broken  # what was there before may have come back
            self._look = BackgroundTask(self._context, self._looked(files, self._seen if known else None))

    async def _looked(self, files: tuple[str, ...], seen: object) -> _Found[T] | None:
        what = f"looking at {self._what}"
        try:
            return await self._context.file_threads.run(what, self._look_at, files, seen)
        except LightllmdError as failure:
            return _Found(files, None, None, failure.message)

    def _look_at(self, files: tuple[str, ...], seen: object) -> _Found[T] | None:
        """In a thread. None: they are as `seen`. Costs a stat for each file unless one of them was touched."""
        stats = [_stat(file) for file in files]
        if (files, stats) == seen:
            return None
        try:
            return _Found(files, stats, self._read(files))
        except Unusable as fault:
            return _Found(files, stats, None, str(fault))

    def step(self) -> None:
        """Takes up what a look has found."""
        if self._look is None or not self._look.done:
            return
        look, self._look = self._look, None
        found = look.result()
        if found is None or found.files != self._files:
            return
        if found.content is None:
            self._broken += 1
            if self._broken >= _LOOKS and found.fault != self.fault:
                self.fault = found.fault
                self._context.events.add(self._kind, f"{self._what} stays as it was: {self.fault}", level="warning")
                self._tell_fault()
            return
        looked_like = found.files, found.stats
        if self.settles and self._settling != looked_like and self._seen is not None:
            self._settling = looked_like
            return
        self._broken, self._seen = 0, looked_like
        self._take(found.content)


def _stat(file: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
