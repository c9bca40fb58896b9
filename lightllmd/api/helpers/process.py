"""The far side of `pool`: processes that do what a client could make slow, huge or endless.

A *zygote* is forked from the api worker once its tokenizer is loaded, which the two share copy-on-write; or it is the
process of a tokenizer whose code the checkpoint brings along (`code_host`). All it does is fork: for each socket that
it is handed, the process that serves it. Such a helper takes one task after the other. It ends when a task takes more
CPU time or memory than it may (the kernel ends it then, whatever code is running), when its socket is closed (the
zygote ends it, whatever it waits for), and with the zygote.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import os
import pickle
import resource
import select
import signal
import socket
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from lightllmd.errors import InvalidRequest, LightllmdError, RequestFailed
from lightllmd.ipc.child_setup import die_with_parent
from lightllmd.remote_code.orders import HEAD, HEAVY

log = logging.getLogger(__name__)

MEMORY = 512 << 20  # bytes of address space beyond what the api worker had

_DEFAULT = (signal.SIGTERM, signal.SIGALRM, signal.SIGPROF, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

Task = Callable[..., Any]


def _pickled(answer: tuple[Any, ...]) -> bytes:
    return pickle.dumps(answer, protocol=5)


def zygote(
    tasks: Mapping[str, Task], orders: socket.socket, parent: int, pack: Callable[[tuple[Any, ...]], bytes] = _pickled
) -> NoReturn:
    """Never returns. To be called in the child of a fork, with the socket on which orders come. `pack` makes the bytes
    of an answer, which is (True, result) or (False, name of the error's class, message, parameters)."""
    die_with_parent(parent)
    _forget_parent(keep=orders.fileno())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    own, watch = os.getpid(), select.poll()
    watch.register(orders, select.POLLIN)
    helpers: dict[int, _Watched] = {}  # by either descriptor
    while True:
        ready = [fd for fd, _ in watch.poll()]
        for fd in ready:
            if fd in helpers:
                helpers[fd].end(watch, helpers)
        if orders.fileno() not in ready:
            continue
        order, descriptors, _, _ = socket.recv_fds(orders, 1, 1)
        if not order:
            os._exit(0)
        link = socket.socket(fileno=descriptors[0])
        try:
            pid = os.fork()
        except OSError:  # closing the socket says it
            link.close()
            continue
        if pid == 0:
            orders.close()
            for fd in helpers:
                os.close(fd)
            die_with_parent(own)
            _serve(tasks, link, pack, heavy=order == HEAVY)
        _Watched(pid, link, watch, helpers)


class _Watched:
    """A helper, of which the zygote keeps a pidfd and its end of the socket, to see when the other end is closed."""

    def __init__(self, pid: int, link: socket.socket, watch: select.poll, helpers: dict[int, _Watched]) -> None:
        self._link, self._pidfd = link.detach(), -1
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError:  # it has ended already, or there is no descriptor left
            os.close(self._link)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return
        helpers[self._link] = helpers[self._pidfd] = self
        watch.register(self._link, select.POLLRDHUP)
        watch.register(self._pidfd, select.POLLIN)

    def end(self, watch: select.poll, helpers: dict[int, _Watched]) -> None:
        """It has ended, or isn't wanted any more."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        for fd in (self._link, self._pidfd):
            watch.unregister(fd)
            del helpers[fd]
            os.close(fd)


def _forget_parent(keep: int) -> None:
    """Lets go of its descriptors (listeners among them), signal handlers and objects."""
    signal.set_wakeup_fd(-1)
    for number in _DEFAULT:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _DEFAULT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.disable()
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != keep:
            with contextlib.suppress(OSError):  # the listing's own is closed already
                os.close(int(name))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads: the cores are others'
    gc.freeze()


def _serve(
    tasks: Mapping[str, Task], link: socket.socket, pack: Callable[[tuple[Any, ...]], bytes], *, heavy: bool
) -> NoReturn:
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
            answer = _run(tasks[name], arguments, pack)
            signal.setitimer(signal.ITIMER_PROF, 0)
            send(link, answer)
            if _has_children():
                # What a tokenizer's code forked is ended as an orphan, by the guard of its host, and holds the socket
                # until then: the other end is to see at once that no task is taken any more.
                link.shutdown(socket.SHUT_RDWR)
                break
    except (OSError, EOFError):
        pass  # the api worker does not want it any more
    finally:
        os._exit(0)


def _run(task: Task, arguments: tuple[Any, ...], pack: Callable[[tuple[Any, ...]], bytes]) -> bytes:
    try:
        return pack((True, task(*arguments)))
    except MemoryError:
        failure: LightllmdError = InvalidRequest(f"reading the request takes more than {MEMORY >> 20} MB of memory")
    except LightllmdError as error:
        failure = error
    except Exception:
        log.exception("a helper's task failed")
        failure = RequestFailed("internal error of the HTTP front end")
    return pack((False, failure.name, failure.message, failure.parameters))


def _has_children() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False


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
