"""The standard streams of the programs: all three are open, and any text can be printed on any of them.

What a stream's encoding can't say is written in other characters. Control characters that came with a name or a message
are shown, not sent to the terminal. A stream that nothing reads ends no program that has more to do than print.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import sys
from typing import Any, TextIO

_HANDLER = "lightllmd.console"  # the name of `_degrade` among Python's error handlers
_PLAIN = {"…": "...", "–": "-", "—": "-", "≤": "<=", "≥": ">=", "×": "x", "·": ".", "●": "*", "→": "->"}
_DOUBTFUL = re.compile(r"[^\x20-\x7e\t\n]")  # everything else is printable for certain


def prepare() -> None:
    """Makes all three streams usable. Is called first: a descriptor that is closed (``>&-``) would else become that of
    the first file or socket that is opened, and what is printed would go there."""
    codecs.register_error(_HANDLER, _degrade)
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            _to_null(fd)
        if getattr(sys, name) is None:  # Python found it closed
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False))  # noqa: SIM115 - never closed
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a test's may be of another kind
            stream.reconfigure(errors=_HANDLER)


def _to_null(fd: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null == fd:
        os.set_inheritable(fd, True)
    else:
        os.dup2(null, fd)
        os.close(null)


# --- characters -----------------------------------------------------------------------------------------------------


def _degrade(error: UnicodeError) -> tuple[str, int]:
    """The error handler of both streams."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character) or escaped(character) for character in text), error.end


def escaped(character: str) -> str:
    r"""``\x1b``, ``\u20ac``, ``\U0001f600``; a byte of a file's name that is no text (surrogateescape) as that byte."""
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
        return f"\\x{code:02x}"
    return f"\\x{code:02x}" if code < 0x20 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def printable(text: str) -> str:
    """`text` with what could drive a terminal (control characters, changes of direction) shown; lines stay lines."""
    return _DOUBTFUL.sub(lambda found: found[0] if found[0].isprintable() else escaped(found[0]), text)


def literal(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON that comes out of stdout as it is, whatever its encoding."""
    text = json.dumps(value, ensure_ascii=not says_anything(sys.stdout), indent=indent)
    return _DOUBTFUL.sub(lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], text)


def says_anything(stream: TextIO) -> bool:
    """Whether its encoding has every character."""
    return (getattr(stream, "encoding", None) or "").lower().startswith("utf")


# --- writing --------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Prints a line, or several, on stdout. Raises OSError."""
    sys.stdout.write(f"{printable(text)}\n")
    sys.stdout.flush()


def complain(text: str) -> None:
    """Prints a line, or several, on stderr. Where stderr takes none, that is no reason to end in another way."""
    try:
        sys.stderr.write(f"{printable(text)}\n")
        sys.stderr.flush()
    except OSError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """What is in its buffer, and what comes, goes nowhere: it would fail again, at the latest at exit."""
    _to_null(stream.fileno())
