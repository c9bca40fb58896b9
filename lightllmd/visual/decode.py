"""Decoding images, each in a process of its own: a bomb, a loop or a crash in a codec ends that one and its image."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from typing import Any

from lightllmd.errors import NotReady
from lightllmd.visual.image_file import ImageFile, ImageRefused, new_memory, seal
from lightllmd.visual.limits import DecodeLimits
from lightllmd.visual.picture import Picture

_ATTEMPTS = 3  # of one image, where a process was ended from outside
_GRACE = 5.0  # seconds for a decoder that was to be killed to be gone, until the forker itself is replaced
_BOOT = 60.0  # seconds for its imports
_MOST_MESSAGE = 64 << 10  # bytes
# What the processes get of the environment: where programs and libraries are. No secrets.
_PASSED = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "PYTHONPATH", "TZ", "VIRTUAL_ENV")


class ImageDecoder:
    """Decodes `limits.processes` images at a time. To be closed."""

    def __init__(self, limits: DecodeLimits) -> None:
        self._limits = limits
        self._turns = asyncio.Semaphore(limits.processes)
        self._orders: Orders | None = None
        self.peak = 0  # bytes of memory that an image took at most, beside its pixels' memfd

    @contextlib.asynccontextmanager
    async def decoded(self, file: ImageFile) -> AsyncIterator[Picture]:
        """The picture, which is closed behind: it counts among those that are decoded at a time until then, so that no
        more pixels are held.

        Raises ImageRefused, which says what is wrong with the image or with its size; NotReady when no process can be
        had.
        """
        if file.size > self._limits.max_bytes:
            raise ImageRefused(
                f"its file has {file.size} bytes; at most {self._limits.max_bytes} may be, [images] max_bytes"
            )
        async with self._turns:
            with await self._decode(file) as picture:
                yield picture

    async def start(self) -> None:
        """So that the first image finds a process. Raises NotReady."""
        await self._ready()

    async def close(self) -> None:
        """All processes end; what is being decoded is lost."""
        orders, self._orders = self._orders, None
        if orders is not None:
            await orders.close()

    @property
    def pid(self) -> int | None:
        """Of the process that forks the others; None while there is none."""
        return self._orders.pid if self._orders is not None else None

    async def _decode(self, file: ImageFile) -> Picture:
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(_EndedFromOutside):
                return await self._attempt(file)
        raise NotReady("the processes that decode images are killed again and again")

    async def _attempt(self, file: ImageFile) -> Picture:
        orders = await self._ready()
        try:
            pixels = new_memory("pixels")
        except OSError as failure:
            raise NotReady(f"an image cannot be held: {failure.strerror}") from None
        try:
            ended = await orders.decode(file.fd, pixels, self._limits)
            self.peak = max(self.peak, ended.peak)
            width, height, several = self._judge(ended, pixels)
            seal(pixels)
        except BaseException:
            os.close(pixels)
            raise
        return Picture(pixels, width, height, several)

    async def _ready(self) -> Orders:
        if self._orders is None or self._orders.lost:
            if self._orders is not None:
                await self._orders.close()
            try:
                self._orders = Orders()
            except OSError as failure:
                raise NotReady(f"no process can be started to decode images: {failure.strerror}") from None
        orders = self._orders
        await orders.ready()
        return orders

    def _judge(self, ended: _Ended, pixels: int) -> tuple[int, int, bool]:
        """What has become of an image. The report is believed as far as it can be seen."""
        if ended.late:
            raise ImageRefused(f"its file takes more than {self._limits.timeout:g} s to decode")
        if ended.status == -signal.SIGXCPU:
            raise ImageRefused(f"its file takes more than {self._limits.cpu_seconds} s of CPU time to decode")
        if ended.status == -signal.SIGKILL:
            raise _EndedFromOutside
        try:
            report = json.loads(ended.report)
            if "refused" in report:
                raise ImageRefused(str(report["refused"]))
            width, height, several = int(report["width"]), int(report["height"]), bool(report["several"])
            if width < 1 or height < 1 or width * height > self._limits.max_pixels:
                raise ValueError
            if os.fstat(pixels).st_size != 3 * width * height:
                raise ValueError
        except (ValueError, TypeError, KeyError):
            how = signal.Signals(-ended.status).name if ended.status < 0 else f"status {ended.status}"
            raise ImageRefused(f"its file makes the decoder fail ({how})") from None
        return width, height, several


class _EndedFromOutside(Exception):
    """It says nothing of the image."""


@dataclass(frozen=True)
class _Ended:
    status: int  # of the process, a signal as -n
    report: str
    late: bool = False
    peak: int = 0  # bytes of memory


class Orders:
    """The near side of the forker: ``python -m lightllmd.visual.decoder_process``. Messages are JSON, one each packet.

    To it: {"job": n, "limits": …} with the descriptors of file and pixels; {"kill": n}. From it: {} once; then
    {"job": n, "status": …, "report": …, "peak": …} or {"job": n, "failed": …}.
    Raises OSError when there can be no process.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "lightllmd.visual.decoder_process", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # into the log
                    pass_fds=[theirs.fileno()],
                    env={name: os.environ[name] for name in _PASSED if name in os.environ} | {"OMP_NUM_THREADS": "1"},
                )
        except OSError:
            self._link.close()
            raise
        self._link.setblocking(False)
        self._loop.add_reader(self._link.fileno(), self._receive)
        self._begun: asyncio.Future[None] = self._loop.create_future()
        self._jobs: dict[int, Callable[[_Ended | Exception], None]] = {}
        self._next = 0
        self.lost = False  # it is of no use any more

    @property
    def pid(self) -> int:
        """Of the forker."""
        return self._process.pid

    async def ready(self) -> None:
        """Its imports are done. Raises NotReady."""
        try:
            async with asyncio.timeout(_BOOT):
                await asyncio.shield(self._begun)
        except (TimeoutError, _EndedFromOutside):
            self._lose()
            raise NotReady("the process that decodes images does not start") from None

    async def decode(self, file: int, pixels: int, limits: DecodeLimits) -> _Ended:
        """Raises _EndedFromOutside, and NotReady when no process can be forked."""
        job, self._next = self._next, self._next + 1
        ended: asyncio.Future[_Ended] = self._loop.create_future()

        def tell(outcome: _Ended | Exception) -> None:
            if ended.done():
                return
            if isinstance(outcome, Exception):
                ended.set_exception(outcome)
            else:
                ended.set_result(outcome)

        self._jobs[job] = tell
        try:
            socket.send_fds(self._link, [json.dumps({"job": job, "limits": asdict(limits)}).encode()], [file, pixels])
        except OSError:
            del self._jobs[job]
            self._lose()
            raise _EndedFromOutside from None
        try:
            async with asyncio.timeout(limits.timeout):
                return await asyncio.shield(ended)
        except TimeoutError:
            await self._kill(job, ended)
            return _Ended(0, "", late=True)
        except asyncio.CancelledError:
            self._send({"kill": job})
            raise

    async def _kill(self, job: int, ended: asyncio.Future[_Ended]) -> None:
        """A decoder; the forker too, where that does not help."""
        self._send({"kill": job})
        done, _ = await asyncio.wait([ended], timeout=_GRACE)
        if not done:
            self._lose()
        ended.cancel()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._link.send(json.dumps(message).encode())
        except OSError:
            self._lose()

    def _receive(self) -> None:
        try:
            message = self._link.recv(_MOST_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._lose()
            return
        told = json.loads(message)
        if "job" not in told:
            if not self._begun.done():
                self._begun.set_result(None)
            return
        tell = self._jobs.pop(told["job"])
        if "failed" in told:
            tell(NotReady(f"no process can be started to decode an image: {told['failed']}"))
        else:
            tell(_Ended(told["status"], told["report"], peak=told["peak"]))

    def _lose(self) -> None:
        if self.lost:
            return
        self.lost = True
        self._loop.remove_reader(self._link.fileno())
        self._link.close()  # which ends it
        self._process.kill()  # even when it is stopped
        jobs, self._jobs = self._jobs, {}
        for tell in jobs.values():
            tell(_EndedFromOutside())
        if not self._begun.done():
            self._begun.set_exception(_EndedFromOutside())
            self._begun.exception()  # looked at, if nothing else does

    async def close(self) -> None:
        """It ends, with all decoders."""
        self._lose()
        await asyncio.to_thread(self._process.wait)
