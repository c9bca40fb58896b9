"""Log lines as records: kept per worker, followed over the control plane, and passed on to our own stderr."""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec

from lightllmd.supervisor.journal.feed import Feed
from lightllmd.supervisor.journal.output import readable
from lightllmd.supervisor.snapshot import Event, LogLine

LONGEST = 16_384  # characters of a line or an event
OWN = "lightllmd"  # the supervisor's name among the workers'
LEVELS = ("debug", "info", "warning", "error")
_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3}  # sd-daemon(3)
_BY_PRIORITY = ("error", "error", "error", "error", "warning", "info", "info", "debug")
_PREFIX = re.compile(r"<([0-7])>")


def shortened(text: str) -> str:
    """What it quotes may be of any length; the reason stands at its end."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 4 :]}"


class Sink:
    """Writes to a descriptor from a thread of its own, so that a stuck terminal or journal never stops the loop.

    What doesn't fit into the queue is dropped, and said.
    """

    def __init__(self, fd: int, depth: int = 10_000) -> None:
        self._fd = fd
        self._queue: queue.Queue[bytes | None] = queue.Queue(depth)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Queues a line, which ends with its newline. Never waits."""
        try:
            if self._dropped:
                self._queue.put_nowait(b"(%d log lines dropped: they were not read in time)\n" % self._dropped)
                self._dropped = 0
            self._queue.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self, timeout: float = 1.0) -> None:
        """Waits until all is written, but not for ever."""
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _run(self) -> None:
        while (line := self._queue.get()) is not None:
            view = memoryview(line)
            while view:
                try:
                    view = view[os.write(self._fd, view) :]
                except BlockingIOError:
                    time.sleep(0.01)  # the descriptor was handed to us non-blocking
                except OSError:
                    break  # it has no reader any more; the rings still keep the lines


def text_line(line: LogLine) -> str:
    """For people: local time to the millisecond, worker, level unless it is info, message."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line.at)) + f".{int(line.at % 1 * 1000):03d}"
    level = "" if line.level == "info" else line.level.upper() + " "
    return f"{stamp} {line.worker}: {level}{line.message}"


def journal_line(line: LogLine) -> str:
    """The journal adds the time itself and reads the priority."""
    return f"<{_PRIORITY[line.level]}>{line.worker}: {line.message}"


def json_line(line: LogLine) -> str:
    """The record as one line of JSON."""
    return msgspec.json.encode(line).decode()


def journal_json_line(line: LogLine) -> str:
    """The record as JSON behind its sd-daemon(3) priority."""
    return f"<{_PRIORITY[line.level]}>{json_line(line)}"


def renderer(form: str, journal: bool) -> Callable[[LogLine], str]:
    """`form`: [log] format; `journal`: whether what we write goes there."""
    if form == "json":
        return journal_json_line if journal else json_line
    return journal_line if journal else text_line


def parse_output(text: str) -> tuple[str, str]:
    """(level, message) of a line that a worker printed; it may begin with an sd-daemon priority, as ``<4>``."""
    match = _PREFIX.match(text)
    return (_BY_PRIORITY[int(match[1])], text[match.end() :]) if match else ("info", text)


class LogBook:
    """All log lines: `keep` per worker, so a chatty one doesn't push out another's last words."""

    def __init__(self, keep: int, level: str, render: Callable[[LogLine], str], sink: Sink | None) -> None:
        self.feed: Feed[LogLine] = Feed(keep)
        self._keep = keep
        self._rings: dict[str, deque[LogLine]] = {}
        self._threshold = LEVELS.index(level)
        self._render = render
        self._sink = sink

    def configure(self, keep: int, level: str, render: Callable[[LogLine], str]) -> None:
        """Lines per worker, lowest level and rendering from now on; of lines that are there the newest stay."""
        self._keep, self._threshold, self._render = keep, LEVELS.index(level), render
        self._rings = {worker: deque(ring, maxlen=keep) for worker, ring in self._rings.items()}

    def write(self, worker: str, level: str, message: str) -> None:
        """A message of several lines becomes as many, each with its level."""
        if LEVELS.index(level) < self._threshold:
            return
        for text in message.split("\n"):
            line = LogLine(at=time.time(), worker=worker, level=level, message=readable(shortened(text)))
            if worker not in self._rings:
                self._rings[worker] = deque(maxlen=self._keep)
            self._rings[worker].append(line)
            self.feed.add(line)
            if self._sink is not None:
                self._sink.write(self._render(line).encode(errors="replace") + b"\n")

    def write_output(self, worker: str, text: str) -> None:
        """A line that a worker printed."""
        self.write(worker, *parse_output(text))

    def last(self, count: int, worker: str | None = None) -> list[LogLine]:
        """At most `count` of the newest lines, oldest first; of all workers where none is named."""
        if count <= 0:
            return []
        if worker is not None:
            return list(self._rings.get(worker, ()))[-count:]
        return sorted((line for ring in self._rings.values() for line in ring), key=lambda line: line.at)[-count:]

    def own(self, level: str, message: str) -> None:
        """The supervisor's own word."""
        self.write(OWN, level, message)


class EventBook:
    """What happened to the daemon, in an operator's words; each is a log line too."""

    def __init__(self, log: LogBook, keep: int = 1000) -> None:
        self.feed: Feed[Event] = Feed(keep)
        self._log = log
        self._sequence = 0

    def add(self, kind: str, message: str, worker: str | None = None, level: str = "info") -> None:
        """Keeps an event of this `kind` (see `snapshot.Event`) and logs it at `level`."""
        self._sequence += 1
        told = Event(seq=self._sequence, at=time.time(), kind=kind, worker=worker, message=shortened(message))
        self.feed.add(told)
        self._log.write(OWN, level, f"{worker}: {message}" if worker else message)


class StandardLogging(logging.Handler):
    """Takes what libraries (asyncio, uvicorn) say through `logging` into the book; they say it in the loop's thread."""

    def __init__(self, log: LogBook) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the message, and the traceback that comes with it, as lines of the supervisor's own."""
        level = "error" if record.levelno >= logging.ERROR else "warning"
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + (self.formatter or logging.Formatter()).formatException(record.exc_info)
        for line in message.splitlines():
            self._log.write(OWN, level, f"{record.name}: {line}")
