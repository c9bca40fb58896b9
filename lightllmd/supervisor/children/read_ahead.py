"""Weight files on their way into the page cache while something else is waited for."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence

from lightllmd.errors import SystemFailure
from lightllmd.supervisor.children.process import Process
from lightllmd.supervisor.context import Context


class ReadAheadChild:
    """One child that reads; nothing depends on it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._process: Process | None = None

    def reap(self, pid: int) -> bool:
        """Reaps the child if that is `pid`."""
        if self._process is None or self._process.pid != pid:
            return False
        self._process.reap()
        return True

    async def run(self, files: Sequence[str]) -> None:
        """Until all is read. Cancelled, it ends the child."""
        context, ended = self._context, asyncio.Event()
        try:
            process = self._process = Process(
                context.commands.read_ahead(files),
                on_exit=ended.set,
                on_output=lambda line: context.log.write_output("read-ahead", line),
                tied=True,
            )
        except SystemFailure as refused:
            context.log.own("warning", f"nothing is read ahead: {refused.message}")
            return
        context.short_lived.add(self)
        try:
            await ended.wait()
        finally:
            if process.reap() is None:
                process.send_signal(signal.SIGKILL)
                await ended.wait()
                process.reap()
            process.dispose()
            self._process = None
            context.short_lived.discard(self)
