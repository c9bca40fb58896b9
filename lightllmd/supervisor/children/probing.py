"""One run of the probe child, which reads the facts so that the loop waits for no file and no device."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import msgspec

from lightllmd import errors
from lightllmd.config import resolve
from lightllmd.config.parameters import Config
from lightllmd.config.plan import Facts
from lightllmd.supervisor.children.exits import FAULTS, classify, signal_name
from lightllmd.supervisor.children.process import Process
from lightllmd.supervisor.context import Context

TIMEOUT = 60.0  # seconds; headers on a slow network file system
_KILL_TIMEOUT = 2.0  # seconds until a killed probe is given up; it dies when the kernel lets it
_BY_CODE = {kind.exit_code: kind for kind in (errors.NoUsableDevice, errors.SystemFailure, errors.TryAgain)}


class FactsProbe:
    """`process` is the child while it lives."""

    def __init__(self, context: Context, config: Config | None = None, config_file: str | None = None) -> None:
        self._context = context
        self._config, self._config_file = config or context.config, config_file  # what faults are told with
        self.process: Process | None = None
        self._stderr: list[str] = []

    def reap(self, pid: int) -> bool:
        """Reaps the child if that is `pid`."""
        if self.process is None or self.process.pid != pid:
            return False
        self.process.reap()
        return True

    async def ask(self, **request: Any) -> Facts:
        """`request` as `lightllmd.probe` reads it. Cancelled, it ends the child. Raises LightllmdError."""
        ended = asyncio.Event()
        process = self.process = Process(
            self._context.commands.probe(),
            on_exit=ended.set,
            on_output=self._said,
            stdin=msgspec.json.encode(request),
            capture=True,
            tied=True,
        )
        self._context.short_lived.add(self)
        try:
            async with asyncio.timeout(TIMEOUT):
                await ended.wait()
        except TimeoutError:
            raise errors.TryAgain(f"reading model and device took longer than {TIMEOUT:g} s") from None
        finally:
            if process.reap() is None:
                process.send_signal(signal.SIGKILL)
                await asyncio.wait([asyncio.ensure_future(ended.wait())], timeout=_KILL_TIMEOUT)
                process.reap()
            process.dispose()
            self.process = None
            self._context.short_lived.discard(self)
        last_words = self._stderr[-1] if self._stderr else ""
        return answered(
            process.reap() or 0, bytes(process.captured or b""), last_words, self._config, self._config_file
        )

    def _said(self, line: str) -> None:
        self._stderr.append(line)
        self._context.log.write_output("probe", line)


def answered(code: int, output: bytes, last_words: str, config: Config, config_file: str | None) -> Facts:
    """What a probe that ended with `code` (negative: a signal) found, from its lines of output, else the end of its
    stderr. Raises LightllmdError: what was wrong with the model belongs to `model_dir`."""
    lines = output.splitlines()
    answer = lines[-1] if lines else b""
    if code == 0:
        try:
            return msgspec.json.decode(answer, type=Facts)
        except msgspec.MsgspecError as garbage:
            raise errors.SystemFailure(f"the probe's answer can't be read: {garbage}") from garbage
    try:
        told = msgspec.json.decode(answer, type=dict)
    except msgspec.MsgspecError:
        told = {}
    problems = told.get("problems")
    if isinstance(problems, list):
        given = [errors.Problem(**problem) for problem in problems]
        raise errors.ConfigInvalid(resolve.located(given, config, config_file))
    message = told.get("message", "")
    if -code in {*FAULTS, signal.SIGXCPU} and "reading" in told:
        took = (
            "takes too much processor time" if -code == signal.SIGXCPU else f"ends its reader by {signal_name(-code)}"
        )
        message = f"{told['reading']}: reading its settings or its tokenizer {took}"
        if told["reading"] != config.params.model_dir:
            raise errors.LightllmdError(message)  # another model, which room was to be kept for
        code = errors.EXIT_CONFIG
    if code == errors.EXIT_CONFIG and message:
        problem = errors.Problem("model_dir", message)
        raise errors.ConfigInvalid(resolve.located([problem], config, config_file))
    message = message or last_words or classify(code).cause
    raise _BY_CODE.get(code, errors.LightllmdError)(f"reading model and device failed: {message}")
