"""The far side of `pool`: processes that do what a client could make slow, huge or endless.

A *zygote* is forked from the api worker once its tokenizer is loaded, which the two share copy-on-write. All it does is
fork: for each socket that it is handed, the process that serves it. Such a helper takes one task after the other. It
ends when its socket is closed, when a task takes more CPU time or memory than it may (the kernel ends it then, whatever
code is running), and with the api worker.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import os
import pickle
import resource
import signal
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from lightllmd.errors import InvalidRequest, LightllmdError, RequestFailed
from lightllmd.ipc.child_setup import die_with_parent

log = logging.getLogger(__name__)

HEAD = struct.Struct("<Q")  # the length of the pickle that follows
LIGHT, HEAVY = b"l", b"h"  # what the zygote is told with a socket
MEMORY = 512 << 20  # bytes of address space beyond what the api worker had

Task = Callable[..., Any]


def zygote(tasks: Mapping[str, Task], orders: socket.socket, parent: int) -> NoReturn:
    """Never returns. To be called in the child of a fork, with the socket on which orders come."""
    die_with_parent(parent)
    _forget_parent(keep=orders.fileno())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    while True:
        order, descriptors, _, _ = socket.recv_fds(orders, 1, 1)
        if not order:
            os._exit(0)
        own = os.getpid()
        try:
            pid = os.fork()
        except OSError:  # closing the socket says it
            pid = -1
        if pid == 0:
            orders.close()
            die_with_parent(own)
            _serve(tasks, socket.socket(fileno=descriptors[0]), heavy=order == HEAVY)
        os.close(descriptors[0])


def _forget_parent(keep: int) -> None:
    """Lets go of its descriptors (listeners among them), signal handlers and objects."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.disable()
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != keep:
            with contextlib.suppress(OSError):  # the listing's own is closed already
                os.close(int(name))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads: the cores are others'
    gc.freeze()


def _serve(tasks: Mapping[str, Task], link: socket.socket, *, heavy: bool) -> NoReturn:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    bound = _address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    if heavy:
        gc.disable()  # it lives for one task
        # A core that an engine or an event loop needs is theirs at once.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    try:
        while (request := receive(link)) is not None:
            name, seconds, arguments = pickle.loads(request)
            del request
            # SIGPROF ends the process, in the middle of any code.
            signal.setitimer(signal.ITIMER_PROF, seconds)
            answer = _run(tasks[name], arguments)
            signal.setitimer(signal.ITIMER_PROF, 0)
            send(link, answer)
    except (OSError, EOFError):
        pass  # the api worker does not want it any more
    finally:
        os._exit(0)


def _run(task: Task, arguments: tuple[Any, ...]) -> bytes:
    """A pickled (True, result), or (False, name of the error's class, message, parameters)."""
    try:
        return pickle.dumps((True, task(*arguments)), protocol=5)
    except MemoryError:
        failure: LightllmdError = InvalidRequest(f"reading the request takes more than {MEMORY >> 20} MB of memory")
    except LightllmdError as error:
        failure = error
    except Exception:
        log.exception("a helper's task failed")
        failure = RequestFailed("internal error of the HTTP front end")
    return pickle.dumps((False, failure.name, failure.message, failure.parameters), protocol=5)


def _address_space() -> int:
    """Bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


# --- messages ---------------------------------------------------------------------------------------------------------


def send(link: socket.socket, data: bytes) -> None:
    """One message. Raises OSError."""
    link.sendall(HEAD.pack(len(data)))
    link.sendall(data)


def receive(link: socket.socket) -> bytearray | None:
    """None: the other end is closed. Raises EOFError in the middle of a message."""
    head = link.recv(HEAD.size, socket.MSG_WAITALL)
    if not head:
        return None
    if len(head) < HEAD.size:
        raise EOFError
    data = bytearray(HEAD.unpack(head)[0])
    view, got = memoryview(data), 0
    while got < len(data):
        count = link.recv_into(view[got:])
        if not count:
            raise EOFError
        got += count
    return data
