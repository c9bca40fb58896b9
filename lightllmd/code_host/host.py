"""What runs a checkpoint's own code, under the eyes of its guard: takes its order, answers, perhaps goes on."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
from typing import NoReturn

import msgspec

from lightllmd.code_host.tasks import TASKS
from lightllmd.ipc.child_setup import die_with_parent
from lightllmd.remote_code.orders import Answered, Order, receive, send

_MOST_WORDS = 400  # characters of an error


def serve(link: socket.socket, guard: int, scratch: str) -> NoReturn:
    """`scratch`: an empty folder of its own, to be removed by the guard. Never returns."""
    die_with_parent(guard)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (most, most))  # the probe's bound is not ours
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    os.chdir(scratch)
    for name in ("HF_HOME", "HF_MODULES_CACHE", "TMPDIR"):
        os.environ[name] = scratch
    try:
        order = msgspec.msgpack.decode(receive(link), type=Order)
    except (OSError, EOFError, msgspec.MsgspecError):
        os._exit(0)  # it isn't wanted any more
    resource.setrlimit(resource.RLIMIT_DATA, (order.memory, order.memory))
    try:
        task = TASKS[order.task]
        result = task(order.directory, **order.arguments)
        after = None
        if isinstance(result, tuple):
            result, after = result
        send(link, Answered(result))
    except BaseException as failure:  # of a checkpoint's code, which may raise anything, SystemExit too
        send(link, Answered(error=_words(failure, order.memory)))
        os._exit(1)
    if after is not None:
        after(link, guard)
    os._exit(0)


def _words(failure: BaseException, memory: int) -> str:
    if isinstance(failure, MemoryError):
        return f"it takes more than {memory >> 20} MB of memory"
    text = " ".join(f"{type(failure).__name__}: {failure}".split()).removesuffix(":")
    return text if len(text) <= _MOST_WORDS else f"{text[: _MOST_WORDS - 1]}…"
