"""A configuration file as text: its document, and on which line each value stands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tomli

from lightllmd.config.check import Fault
from lightllmd.config.files import read_bytes
from lightllmd.config.toml_lines import Path as KeyPath
from lightllmd.config.toml_lines import key_lines
from lightllmd.errors import Problem

MAX_FILE_BYTES = 1 << 20
_LONGEST_PART = 80  # characters of a key's part in a message


@dataclass(frozen=True)
class Given:
    """One value as it was written. file None: on the command line."""

    value: Any
    file: str | None = None
    line: int | None = None
    element_lines: tuple[int | None, ...] = ()

    def problem(self, key: str, fault: Fault) -> Problem:
        """`fault` of this value, at the line of the element that is at fault where that is known."""
        line: int | None = self.line
        if fault.index is not None and fault.index < len(self.element_lines):
            line = self.element_lines[fault.index] or line
        return Problem(key, fault.message, self.file, line)


@dataclass(frozen=True)
class Document:
    """A file that is valid TOML."""

    file: str
    tree: dict[str, Any]
    lines: Mapping[KeyPath, int]  # path of each key, table and array element -> its 1-based line

    def given(self, path: KeyPath, value: Any) -> Given:
        """`value`, which stands at `path`."""
        elements = tuple(self.lines.get((*path, n)) for n in range(len(value))) if isinstance(value, list) else ()
        return Given(value, self.file, self.lines.get(path), elements)

    def problem(self, path: KeyPath, message: str) -> Problem:
        """A fault of what stands at `path`."""
        return Problem(".".join(map(_shown, path)), message, self.file, self.lines.get(path))


def _shown(part: object) -> str:
    """A part of a key, which may have any length in a file."""
    text = str(part)
    return text if len(text) <= _LONGEST_PART else f"{text[: _LONGEST_PART - 1]}…"


class Unreadable(Exception):
    """The file can't be had, or is no TOML."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


def parse(file: str) -> Document:
    """What a file holds. Raises Unreadable."""
    try:
        body = read_bytes(file, MAX_FILE_BYTES)
    except OSError as error:
        raise Unreadable(f"can't be read: {error.strerror}") from None
    return parse_text(file, body)


def parse_text(file: str, body: bytes) -> Document:
    """Of what was read from `file`. Raises Unreadable."""
    try:
        text = body.decode("utf-8-sig")  # editors on Windows begin with a byte order mark
    except UnicodeDecodeError as error:
        line = body.count(b"\n", 0, error.start) + 1
        raise Unreadable(f"byte 0x{body[error.start]:02x} is not valid UTF-8", line) from None
    try:
        return Document(file, tomli.loads(text), key_lines(text))
    except RecursionError:
        raise Unreadable("is nested too deeply") from None
    except ValueError as error:
        raise _syntax_error(str(error), text) from None


def _syntax_error(message: str, text: str) -> Unreadable:
    """tomli's message, its position taken apart."""
    match = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    if match is None:
        return Unreadable(f"TOML syntax: {message}")
    line = int(match[1]) if match[1] else max(1, len(text.splitlines()))
    return Unreadable(f"TOML syntax: {message[: match.start()]}", line)
