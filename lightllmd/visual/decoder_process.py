"""``python -m lightllmd.visual.decoder_process LINK_FD``: forks a process for each image, which decodes it and ends.

This one reads nothing of images, so that it has all that a decoder needs in memory and stays sound. A decoder is
confined before it looks at its image (see `sandbox`), and nothing of it is left for the next image. The link (see
`decode.Orders`) brings orders with two descriptors each, the image's file and the memory for its pixels; its end ends
all.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
from typing import Any

from lightllmd.ipc.child_setup import die_with_parent
from lightllmd.visual import sandbox
from lightllmd.visual.image_file import ImageRefused
from lightllmd.visual.limits import DecodeLimits
from lightllmd.visual.read_image import ReadImage

_SMALL = 64 << 20  # bytes of address space, beside the file, until the header is read; and beside the pixels after that
_PIXEL = 32  # bytes: what the costliest codec holds for each pixel at a time (WebP's two canvases, and copies)
_NICE = 5  # decoders leave the processors to what makes tokens
_MOST_MESSAGE = 64 << 10  # bytes
_MOST_REPORT = 4096  # bytes; a pipe takes more


class _Forker:
    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self._decoders: dict[int, tuple[int, int]] = {}  # process -> (job, pipe of its report)

    def serve(self) -> None:
        """Until the link's other end is closed."""
        watch = select.poll()
        watch.register(self._link, select.POLLIN)
        watch.register(self._wake, select.POLLIN)
        while True:
            ready = [fd for fd, _ in watch.poll()]
            if self._wake in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake, 4096)
                self._reap()
            if self._link.fileno() in ready and not self._take_order():
                return

    def _take_order(self) -> bool:
        message, descriptors, _, _ = socket.recv_fds(self._link, _MOST_MESSAGE, 2)
        if not message:
            return False
        order = json.loads(message)
        if "kill" in order:
            for process, (job, _) in self._decoders.items():
                if job == order["kill"]:
                    os.kill(process, signal.SIGKILL)
            return True
        try:
            file, pixels = descriptors
            self._fork(order["job"], file, pixels, DecodeLimits(**order["limits"]))
        finally:
            for fd in descriptors:
                os.close(fd)
        return True

    def _fork(self, job: int, file: int, pixels: int, limits: DecodeLimits) -> None:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()
        try:
            process = os.fork()
        except OSError as failure:
            os.close(reading)
            os.close(writing)
            self._link.send(json.dumps({"job": job, "failed": failure.strerror}).encode())
            return
        if process == 0:
            _become_decoder(parent, file, pixels, writing, self._nowhere, limits)
        os.close(writing)
        self._decoders[process] = job, reading

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.wait4(-1, os.WNOHANG))[0]:
                process, status, used = ended
                job, reading = self._decoders.pop(process)
                report = os.read(reading, _MOST_REPORT)
                os.close(reading)
                told = {
                    "job": job,
                    "status": os.waitstatus_to_exitcode(status),
                    "report": report.decode("latin-1"),
                    "peak": used.ru_maxrss << 10,
                }
                self._link.send(json.dumps(told).encode())


def _become_decoder(parent: int, file: int, pixels: int, report: int, nowhere: int, limits: DecodeLimits) -> None:
    """Never returns."""
    try:
        die_with_parent(parent)
        signal.set_wakeup_fd(-1)
        for fd in (0, 1, 2):  # codecs print warnings
            os.dup2(nowhere, fd)
        kept = sorted((2, file, pixels, report))
        for low, high in zip(kept, [*kept[1:], 1 << 30], strict=True):
            os.closerange(low + 1, high)
        with contextlib.suppress(OSError):
            os.nice(_NICE)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as adjust:
            adjust.write("1000")
        told = _decode(file, pixels, limits)
        os.write(report, json.dumps(told).encode()[:_MOST_REPORT])
        os._exit(0)
    finally:
        os._exit(1)


def _decode(file: int, pixels: int, limits: DecodeLimits) -> dict[str, Any]:
    """The report: `refused`, or `width`, `height` and `several`."""
    size = os.fstat(file).st_size
    begun = sandbox.address_space() + 2 * size + _SMALL
    sandbox.confine(
        memory=begun,
        most_memory=begun + _SMALL + _PIXEL * limits.max_pixels,
        cpu_seconds=limits.cpu_seconds,
        written=3 * limits.max_pixels,
    )
    try:
        data = os.pread(file, size, 0)
        read = ReadImage(data, limits, lambda count: sandbox.allow_memory(begun + _SMALL + _PIXEL * count))
        for rows in read.rows():
            view = memoryview(rows)
            while view:
                view = view[os.write(pixels, view) :]
    except ImageRefused as refusal:
        return {"refused": refusal.message}
    except MemoryError:
        return {"refused": "its file takes more memory to decode than images of its size do"}
    return {"width": read.width, "height": read.height, "several": read.first_of_several}


def main() -> int:
    """Ends when the link does; what a terminal or a service manager sends is for others."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    link = socket.socket(fileno=int(sys.argv[1]))
    link.set_inheritable(False)
    gc.freeze()  # a collection in a decoder would copy the pages of all objects
    link.send(b"{}")  # its imports are done
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        _Forker(link).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
