"""What a child prints, as lines: bounded in length and in rate, readable, each with its priority, whatever comes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

LONGEST_LINE = 8 << 10  # bytes; a longer line is cut into several. Escaped it still fits a line of the journal (48 KiB)
RATE = 200_000  # bytes a second that are passed on; a line costs its length and LINE_COST
BURST = 200_000  # bytes that may come at once: the stacks of a hundred threads, 20 ms of the loop's time
LINE_COST = 100  # bytes: what a line costs the loop (some 10 us) beside its length
LAST_BYTES, LAST_LINES = 64 << 10, 200  # of what is dropped, kept in case that they are the child's last words

_PRIORITY = re.compile(rb"<[0-7]>")
# What CPython prints of a fault, by itself or through faulthandler, without a priority.
_FAULTS = (
    b"Traceback (most recent call last):",
    b"Fatal Python error: ",
    b"Exception in thread ",
    b"Exception ignored in",
    b"Current thread 0x",
    b"Thread 0x",
)


class OutputLines:
    """Cuts the bytes of one pipe into lines for `say`.

    A line may begin with an sd-daemon priority (``<4>``). Lines without one that follow the beginning of a traceback
    get that of an error, up to the next line that has its own: where a traceback ends can't be seen from its lines.

    A child that prints faster than `RATE` would take the loop's time from all others, and one whose pipe isn't read
    would stop in the middle of its work. So what is too much is read and dropped, and that is said.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._pending = b""  # no whole line yet; at most LONGEST_LINE
        self._in_fault = False  # after the beginning of a traceback
        self._budget = float(BURST)
        self._reckoned: float | None = None  # monotonic seconds: when the budget was
        self.flooded = False  # too much comes: it is dropped
        self._dropped = 0  # bytes, in this flood
        self._last = b""  # the newest of them

    def feed(self, chunk: bytes, now: float) -> None:
        """`now`: monotonic seconds."""
        if self._reckoned is not None:
            self._budget = min(BURST, self._budget + (now - self._reckoned) * RATE)
        self._reckoned = now
        if self.flooded and self._budget >= BURST / 2:  # not earlier, or a flood would be passed on in scraps
            self._say(_were_dropped(self._dropped))
            self._pending = self._last.rpartition(b"\n")[2][-LONGEST_LINE:]
            self.flooded, self._dropped, self._last = False, 0, b""
        if self.flooded:
            self._drop(chunk)
            return
        data, begin = self._pending + chunk, 0
        self._pending = b""
        while (end := data.find(b"\n", begin)) >= 0:
            if self._budget < 0:
                break
            for piece in _pieces(data[begin:end]):
                self._pass(piece)
            begin = end + 1
        rest = data[begin:]
        if self._budget < 0 and len(rest) > LONGEST_LINE:
            self._say(f"<4>(more than {RATE // 1000} kB a second: the rest is dropped)")
            self._drop(rest)
            return
        *pieces, self._pending = _pieces(rest)
        for piece in pieces:
            self._pass(piece)

    def end(self) -> None:
        """Nothing more comes."""
        *last, unended = (self._last or self._pending).split(b"\n")
        last = [*last, unended][-LAST_LINES:] if unended else last[-LAST_LINES:]
        if (dropped := self._dropped - sum(len(line) + 1 for line in last)) > 0:
            self._say(_were_dropped(dropped))
        for line in last:
            for piece in _pieces(line):
                self._pass(piece)
        self._pending = self._last = b""
        self._dropped = 0

    def _drop(self, data: bytes) -> None:
        """Costs the loop next to nothing."""
        self.flooded = True
        self._dropped += len(data)
        self._last = (self._last + data)[-LAST_BYTES:]

    def _pass(self, line: bytes) -> None:
        self._budget -= len(line) + LINE_COST
        if _PRIORITY.match(line):
            self._in_fault = False
        elif self._in_fault or line.startswith(_FAULTS):
            self._in_fault = True
            line = b"<3>" + line
        self._say(readable(line.rstrip(b"\r").decode(errors="replace")))


def _were_dropped(amount: int) -> str:
    return f"<4>({amount / 1000:,.1f} kB were dropped)"


def readable(text: str) -> str:
    """`text` without control characters, which would drive a terminal or end a line in the journal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)


def _pieces(line: bytes) -> Iterator[bytes]:
    """`line` in pieces of at most LONGEST_LINE bytes, each with the priority that it begins with."""
    mark = found[0] if (found := _PRIORITY.match(line)) else b""
    while len(line) > LONGEST_LINE:
        cut = LONGEST_LINE
        while line[cut] & 0xC0 == 0x80 and cut > LONGEST_LINE - 4:  # in the middle of a character of UTF-8
            cut -= 1
        yield line[:cut]
        line = mark + line[cut:]
    yield line
