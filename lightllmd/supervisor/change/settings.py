"""The configuration in force and the one that is written: what the daemon was told, and what a reload would take up."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence

from lightllmd.config import cli, models
from lightllmd.config.cli import Invocation
from lightllmd.config.diff import diff
from lightllmd.config.parameters import Config
from lightllmd.config.stamps import Stamp, changed_files
from lightllmd.errors import ControlError, LightllmdError, NoSuchModel, TryAgain
from lightllmd.supervisor.children.crashes import words
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.host.file_threads import TIMEOUT


class Settings:
    """The configuration that the file (or the command line) says, and the model that a swap has put in its place."""

    def __init__(self, invocation: Invocation) -> None:
        self.invocation = invocation
        self.written = invocation.config
        self.loaded = time.time()
        # What the last swap was asked for; None: the configuration's own model is served. Not kept over restarts of the
        # daemon: what a start serves is read in one place, its configuration.
        self.swapped_to: str | None = None
        self.pending = 0  # changes that a reload would take up
        self.pending_fault = ""  # or why it would fail
        # What the files that count looked like when `_found` was (pending, pending_fault) of them. One look at a time
        # changes it, in a thread.
        self._seen: object = None
        self._found = (0, "")

    @property
    def effective(self) -> Config:
        """What is to be served: the written configuration with the model that was swapped to."""
        return self.for_model(self.written, self.swapped_to)

    @staticmethod
    def for_model(written: Config, chosen: str | None) -> Config:
        """`chosen` as an operator writes it; None: the file's own model. Raises NoSuchModel."""
        return models.at_top(written) if chosen is None else models.choose(written, chosen)

    @property
    def own_model(self) -> str:
        """What the configuration itself serves, and so does the daemon when it starts anew."""
        return models.name_of(self.written) or self.written.params.model_dir or ""

    def swap_to(self, model: str) -> None:
        """A swap to `model` is in force; to the configuration's own model: none is."""
        own = self.for_model(self.written, None)
        self.swapped_to = model if diff(own, self.for_model(self.written, model)) else None

    def reread(self) -> Config:
        """The file as it is now, under the same flags. Reads files, so it belongs into a thread. Raises
        ConfigInvalid."""
        return cli.reload(self.invocation)

    async def look(self, context: Context, stamps: Sequence[Stamp]) -> None:
        """Finds out what is pending. `stamps`: the model's files as they were planned. All files are read in a thread,
        and it is waited for however long that hangs: one that has come back is needed before the next is sent."""
        loaded = self.loaded
        try:
            work = asyncio.get_running_loop().run_in_executor(
                context.file_threads, self._look, loaded, context.config, stamps
            )
        except TryAgain as full:
            self.pending_fault = full.message
            return
        done, _ = await asyncio.wait([work], timeout=TIMEOUT)
        if not done and self.loaded == loaded:
            self.pending_fault = f"looking at the files takes longer than {TIMEOUT:g} s: is their file system there?"
        found = await work
        if self.loaded == loaded:
            self.pending, self.pending_fault = found

    def _look(self, loaded: float, in_force: Config, stamps: Sequence[Stamp]) -> tuple[int, str]:
        """In a thread. Costs a stat for each file unless one of them was touched."""
        named = [self.invocation.config_file or "", *self.written.http.key_files.values()]
        seen = loaded, [(file, _stat(file)) for file in (*named, *(stamp.path for stamp in stamps))]
        if seen != self._seen:
            self._found = self._pending(in_force, stamps)
            self._seen = seen
        return self._found

    def _pending(self, in_force: Config, stamps: Sequence[Stamp]) -> tuple[int, str]:
        """As `pending` and `pending_fault`. The model's files count as one change, as a reload tells them."""
        try:
            changes = len(diff(in_force, self.after(self.reread())))
            return changes + bool(changed_files(stamps)), ""
        except LightllmdError as fault:
            return 0, fault.message
        except Exception as fault:
            return 0, words(fault)

    def take(self, written: Config) -> None:
        """A swap lasts as long as the file names the same model of its own."""
        self.loaded, self.pending, self.pending_fault = time.time(), 0, ""
        if written.params.model_dir != self.written.params.model_dir:
            self.swapped_to = None
        self.written = written

    def after(self, written: Config) -> Config:
        """What `take` of it would put in force."""
        same = written.params.model_dir == self.written.params.model_dir
        try:
            return self.for_model(written, self.swapped_to if same else None)
        except NoSuchModel as gone:
            raise ControlError(f"{gone.message}, but it is served now: swap to another model first") from gone


def _stat(file: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
