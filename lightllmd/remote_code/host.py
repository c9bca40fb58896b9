"""The near side of a code host: a process that runs what a checkpoint brings along, bounded in time and memory.

How to use it, from a process that must not run such code itself (the probe, an api worker, an engine):

    settings = ask("config", directory, reference="configuration_x.XConfig")

starts ``python -m lightllmd.code_host``, has it run the task of that name in `code_host.tasks.TASKS`, and returns the
result, which is plain data. A further task is a function there. Whatever goes wrong (an exception, `sys.exit`, a crash,
too much time or memory) is a ConfigInvalid that names the folder. Nothing of it is left afterwards, processes
that the code forked included. `Host` is the same for a process that stays and takes orders.

The code runs as the daemon's user and can do what that user can; what it is kept from are accidents: it inherits no
descriptor, no key, no signal handler, and no access to a hub (HF_HUB_OFFLINE).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import msgspec

from lightllmd.errors import ConfigInvalid
from lightllmd.remote_code.orders import Answered, Order, receive, send
from lightllmd.weights.model_files import invalid

SECONDS = 40.0  # by the clock, for imports (transformers takes 5), the code and its files; less than the probe's
RUNNING = "running the code that it brings"
MEMORY = 4 << 30  # bytes of data
_SIGNALS = {int(number) for number in signal.Signals}
_PATIENCE = 5.0  # seconds until a host that was let go is killed
# What a host gets of the environment: where programs and libraries are, and the language. No secrets.
_PASSED = (
    "HOME",
    "LANG",
    "LANGUAGE",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "PATH",
    "PYTHONHOME",
    "PYTHONPATH",
    "TMPDIR",
    "TIKTOKEN_CACHE_DIR",
    "TZ",
    "VIRTUAL_ENV",
)
_FIXED = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def environment() -> dict[str, str]:
    """Of a host."""
    return {name: os.environ[name] for name in _PASSED if name in os.environ} | _FIXED


class Host:
    """A running one, which has been given its order. `link` is our end of its socket.

    Raises OSError when there can be no process.
    """

    def __init__(self, order: Order, doing: str = RUNNING) -> None:
        """`doing`: what it is for, in errors."""
        self.directory, self._doing = order.directory, doing
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "lightllmd.code_host", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # into the log
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                    env=environment(),
                )
            send(self.link, order)
        except BrokenPipeError:
            pass  # it is dead already; `answer` says how
        except OSError:
            self.link.close()
            raise

    def answer(self, seconds: float) -> Any:
        """The order's result. Raises ConfigInvalid."""
        deadline = time.monotonic() + seconds
        try:
            self.link.settimeout(seconds)
            body = receive(self.link)
            self.link.settimeout(None)
            answered = msgspec.msgpack.decode(body, type=Answered)
        except TimeoutError:
            raise self._refused(f"it takes more than {seconds:g} s") from None
        except (OSError, EOFError, msgspec.MsgspecError):
            raise self._refused(self._ended(deadline)) from None
        if answered.error:
            raise self._refused(answered.error)
        return answered.result

    def _refused(self, why: str) -> ConfigInvalid:
        return invalid(f"{self.directory}: {self._doing} failed: {why}")

    def _ended(self, deadline: float) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(max(0.1, deadline - time.monotonic()))
            if code - 128 in _SIGNALS:  # as the host's guard passes one on
                return f"its process was ended by {signal.Signals(code - 128).name}"
            return f"its process ended with status {code}"
        return "its process gave no answer"

    @property
    def alive(self) -> bool:
        """Whether it can take orders: a host whose code ended it closes the link."""
        watch = select.poll()
        watch.register(self.link, select.POLLRDHUP)
        return not watch.poll(0)

    def let_go(self) -> None:
        """As `end`, which a thread waits for. Ends an `answer` that another thread waits for."""
        with contextlib.suppress(OSError):
            self.link.shutdown(socket.SHUT_RDWR)
        threading.Thread(target=self.end, daemon=True).start()

    def end(self) -> None:
        """It ends with all that it started, as it does when this process ends. Waits for that."""
        self.link.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def ask(
    task: str, directory: str, *, seconds: float = SECONDS, memory: int = MEMORY, doing: str = RUNNING, **arguments: Any
) -> Any:
    """The result of one task (see the head of this file). Raises ConfigInvalid."""
    try:
        host = Host(Order(task, directory, memory, arguments), doing)
    except OSError as failure:
        raise invalid(f"{directory}: no process can be started to run its code: {failure.strerror}") from None
    try:
        return host.answer(seconds)
    finally:
        host.end()
