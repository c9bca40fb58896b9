"""Work that a client could make slow, huge or endless, done in processes of their own with bounds of CPU time and
memory: JSON of large bodies, chat templates, tokenising. The event loop hands over bytes and gets bytes.

What native code does with the interpreter's lock held stops every thread of a process, so a thread is no help.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import socket
import warnings
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from lightllmd import errors
from lightllmd.api.helpers.process import MEMORY, Task, zygote
from lightllmd.errors import InvalidRequest, LightllmdError, NotReady
from lightllmd.remote_code.orders import HEAD, HEAVY, LIGHT
from lightllmd.text.remote import Forking, RemoteTokenizer, start_failure

log = logging.getLogger(__name__)

CPU_SECONDS = {LIGHT: 2.0, HEAVY: 30.0}  # that a task may take
_PATIENCE = 10  # times as long by the clock: cores may be busy with other things
_TRY_AGAIN = 5.0  # seconds in which a process that could not be started isn't tried again


class HelperDied(Exception):
    """It was ended in the middle of a task; `spent`: seconds by the clock that the task had run."""

    def __init__(self, spent: float) -> None:
        super().__init__(f"a helper process ended after {spent:.1f} s")
        self.spent = spent


class Helpers:
    """Those of one revision. Tasks are named functions, known when the first is asked for.

    All calls come from the thread of the event loop. Processes start when they are needed, at most `light` and `heavy`
    at a time; one light one stays (of a hosted tokenizer all), a heavy one lives for one task, so that its memory is
    free afterwards.
    """

    def __init__(self, tasks: Mapping[str, Task], *, light: int | None = None, heavy: int | None = None) -> None:
        cores = len(os.sched_getaffinity(0))
        self._tasks = tasks
        self._light = light or max(2, min(4, cores))
        self._zygote: Forking | None = None
        self._room = {
            LIGHT: asyncio.Semaphore(self._light),
            HEAVY: asyncio.Semaphore(heavy or max(1, min(4, cores // 2))),
        }
        self._idle: list[_Helper] = []
        self._kept = 1  # of them at most
        self._stopped = False

    def start(self) -> None:
        """Forks the zygote now, which otherwise the first task does. Best while there are no other threads. Raises
        NotReady after `stop`, OSError when there can be no process."""
        self._require_wanted()
        if self._zygote is None or not self._zygote.alive:
            self._end()
            self._zygote = _Zygote(self._tasks)

    def _require_wanted(self) -> None:
        if self._stopped:
            raise NotReady("the model that this request was for is not served any more")

    async def _ready(self) -> Forking:
        """Raises what `start` raises."""
        self.start()
        assert self._zygote is not None
        return self._zygote

    def stop(self) -> None:
        """Ends all of them, at once and for good."""
        self._stopped = True
        self._end()

    def _end(self) -> None:
        self._close_idle()
        if self._zygote is not None:
            self._zygote.end()
            self._zygote = None

    def _close_idle(self) -> None:
        for helper in self._idle:
            helper.close()
        self._idle.clear()

    async def run(
        self,
        name: str,
        *arguments: Any,
        heavy: bool,
        seconds: float | None = None,
        subject: str = "reading the request",
    ) -> Any:
        """The task's result; it may take `seconds` of CPU time, or what is usual for its kind. `subject` of a refusal
        that says so.

        Raises what it raised of this project's errors, InvalidRequest when it took more than it may, NotReady when
        there can be no helper."""
        kind = HEAVY if heavy else LIGHT
        limit = seconds or CPU_SECONDS[kind]
        async with self._room[kind]:
            request = pickle.dumps((name, limit, arguments), protocol=5)
            return await self._try_twice(kind, name, request, limit, subject)

    async def _try_twice(self, kind: bytes, name: str, request: bytes, limit: float, subject: str) -> Any:
        """A helper that was killed from outside is replaced once; what took too long is not tried again."""
        for _ in range(2):
            try:
                async with self._helper(kind) as helper:
                    answer = await helper.ask(request, limit * _PATIENCE)
                    unpack = helper.unpack
                return unpack(name, answer)
            except HelperDied as death:
                log.warning("%s in the middle of a task", death)
                self._close_idle()  # their zygote may be gone
                if death.spent >= limit:
                    break
            except OSError as failure:
                log.error("no helper process can be started: %s", failure)
                raise NotReady("the server can't start a process to read this request with") from None
        raise InvalidRequest(f"{subject} takes more than {limit:g} s of CPU time or {MEMORY >> 20} MB of memory")

    @asynccontextmanager
    async def _helper(self, kind: bytes) -> AsyncIterator[_Helper]:
        """One that is free. It is kept if it is a light one and its task came to an end."""
        helper = self._idle.pop() if kind == LIGHT and self._idle else None
        if helper is None:
            forking = await self._ready()
            helper = _Helper(forking.fork(kind), forking.unpack)
        try:
            yield helper
        except BaseException:
            helper.close()
            raise
        if kind == LIGHT and len(self._idle) < self._kept and not self._stopped:
            self._idle.append(helper)
        else:
            helper.close()


class HostedHelpers(Helpers):
    """Forked by the process of a checkpoint's own tokenizer. One that has died is started again, which takes seconds:
    requests wait for it, and the event loop does not."""

    def __init__(self, tokenizer: RemoteTokenizer, *, light: int | None = None, heavy: int | None = None) -> None:
        """The tokenizer's process is used and ended here from now on."""
        super().__init__({}, light=light, heavy=heavy)
        self._kept = self._light  # every text needs one, and forking takes milliseconds
        self._tokenizer = tokenizer
        self._zygote = tokenizer.take_process()
        self._starting: asyncio.Task[Forking] | None = None
        self._failed: tuple[float, LightllmdError] | None = None  # the last attempt: when (loop's clock), and how

    def start(self) -> None:
        self._require_wanted()

    def stop(self) -> None:
        super().stop()
        self._tokenizer.close()  # also one that is being started

    async def _ready(self) -> Forking:
        self._require_wanted()
        if self._zygote is not None and self._zygote.alive:
            return self._zygote
        if self._starting is None:
            self._end()
            self._starting = asyncio.create_task(self._start_again())
        return await asyncio.shield(self._starting)  # a client that leaves doesn't end it

    async def _start_again(self) -> Forking:
        loop = asyncio.get_running_loop()
        try:
            if self._failed is not None and loop.time() < self._failed[0] + _TRY_AGAIN:
                raise self._failed[1]
            log.warning("the process of the model's own tokenizer is gone; starting it again")
            try:
                started = await loop.run_in_executor(None, self._tokenizer.take_process)
            except Exception as failure:
                self._failed = loop.time(), start_failure(failure)
                log.error("%s", self._failed[1].message)
                raise self._failed[1] from None
            if self._stopped:
                started.end()
                self._require_wanted()
            self._zygote = started
            return started
        finally:
            self._starting = None


class _Zygote(Forking):
    """Raises OSError when there can be no process."""

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        try:
            with warnings.catch_warnings():
                # The child runs Python code alone, takes no lock of another thread's, and ends with os._exit.
                warnings.simplefilter("ignore", DeprecationWarning)
                self.pid = os.fork()
            if self.pid == 0:
                try:
                    zygote(tasks, theirs, parent)
                finally:
                    os._exit(1)
        finally:
            theirs.close()

    @property
    def alive(self) -> bool:
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        return False

    def fork(self, kind: bytes) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                socket.send_fds(self._orders, [kind], [theirs.fileno()])
        except OSError:
            ours.close()
            raise
        return ours

    def unpack(self, name: str, answer: bytes | bytearray) -> Any:
        done, *result = pickle.loads(answer)
        if done:
            return result[0]
        kind, message, parameters = result
        failure: type[LightllmdError] = getattr(errors, kind)
        raise failure(message, **parameters)

    def end(self) -> None:
        self._orders.close()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


class _Helper:
    def __init__(self, link: socket.socket, unpack: Callable[[str, bytearray], Any]) -> None:
        link.setblocking(False)
        self._link = link
        self.unpack = unpack

    async def ask(self, request: bytes, timeout: float) -> bytearray:
        """Raises HelperDied, also when there is no answer in `timeout` seconds."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(timeout):
                await loop.sock_sendall(self._link, HEAD.pack(len(request)))
                await loop.sock_sendall(self._link, request)
                head = await self._receive(HEAD.size)
                return await self._receive(HEAD.unpack(head)[0])
        except (OSError, EOFError, TimeoutError):
            raise HelperDied(loop.time() - began) from None

    async def _receive(self, size: int) -> bytearray:
        loop, data = asyncio.get_running_loop(), bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            count = await loop.sock_recv_into(self._link, view[got:])
            if not count:
                raise EOFError
            got += count
        return data

    def close(self) -> None:
        """It ends as soon as it sees that, or when its task's time is up."""
        self._link.close()
