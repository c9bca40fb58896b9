"""On which line each key of a TOML document stands. The document has already been parsed without error.

tomli keeps no positions, so this scanner walks the text once more. It knows just enough of TOML to step over values:
strings of all four kinds, arrays, inline tables, comments.
"""

from __future__ import annotations

import re

import tomli

Path = tuple[str | int, ...]  # keys, and indices within arrays

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_BASIC = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_LITERAL = re.compile(r"'[^'\n]*'")
_MULTILINE_BASIC = re.compile(r'"""(?:[^\\]|\\.)*?"{3,5}(?!")', re.DOTALL)
_MULTILINE_LITERAL = re.compile(r"'''.*?'{3,5}(?!')", re.DOTALL)
_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")  # space, line ends and comments
_SCALAR = re.compile(r"[^,\]}#\n]*")  # numbers, booleans, dates


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Path, int] = {}
        self.elements: dict[Path, int] = {}  # arrays of tables: the index of the next element
        self.counted = 0  # position up to which line ends were counted
        self.line = 1

    def scan(self) -> dict[Path, int]:
        table: Path = ()
        while self.skip(_BLANK) and self.at < len(self.text):
            if self.text[self.at] == "[":
                table = self.header()
            else:
                self.key_value(table)
        return self.lines

    def skip(self, pattern: re.Pattern[str]) -> bool:
        match = pattern.match(self.text, self.at)
        if match:
            self.at = match.end()
        return match is not None

    def here(self) -> int:
        """The line of the current position; positions only grow."""
        self.line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        return self.line

    def note(self, path: Path) -> None:
        self.lines.setdefault(path, self.here())

    def header(self) -> Path:
        line = self.here()
        array = self.text.startswith("[[", self.at)
        self.at += 2 if array else 1
        keys = self.keys()
        self.at += 2 if array else 1
        path: Path = ()
        for depth, key in enumerate(keys):
            path = (*path, key)
            self.lines.setdefault(path, line)
            last = depth == len(keys) - 1
            if array and last:
                self.elements[path] = self.elements.get(path, 0) + 1
            if path in self.elements:
                path = (*path, self.elements[path] - 1)
                self.lines.setdefault(path, line)
        return path

    def keys(self) -> list[str]:
        """A dotted key, and the space around it."""
        found = []
        while True:
            self.skip(_SPACE)
            start = self.at
            if self.skip(_BARE):
                found.append(self.text[start : self.at])
            elif self.skip(_BASIC) or self.skip(_LITERAL):
                found.append(tomli.loads(f"key = {self.text[start : self.at]}")["key"])
            else:
                raise ValueError(f"no key on line {self.here()}")
            self.skip(_SPACE)
            if not self.text.startswith(".", self.at):
                return found
            self.at += 1

    def key_value(self, table: Path) -> None:
        self.skip(_SPACE)
        line = self.here()
        path = table
        for key in self.keys():
            path = (*path, key)
            self.lines.setdefault(path, line)
        self.at += 1  # the equals sign
        self.value(path)

    def value(self, path: Path) -> None:
        self.skip(_SPACE)
        if self.text.startswith("[", self.at):
            self.array(path)
        elif self.text.startswith("{", self.at):
            self.inline_table(path)
        elif not any(map(self.skip, (_MULTILINE_BASIC, _MULTILINE_LITERAL, _BASIC, _LITERAL))):
            self.skip(_SCALAR)

    def array(self, path: Path) -> None:
        self.at += 1
        index = 0
        while self.skip(_BLANK) and not self.text.startswith("]", self.at):
            self.note((*path, index))
            self.value((*path, index))
            index += 1
            self.skip(_BLANK)
            if self.text.startswith(",", self.at):
                self.at += 1
        self.at += 1

    def inline_table(self, path: Path) -> None:
        self.at += 1
        while self.skip(_BLANK) and not self.text.startswith("}", self.at):
            self.key_value(path)
            self.skip(_BLANK)
            if self.text.startswith(",", self.at):
                self.at += 1
        self.at += 1


def key_lines(text: str) -> dict[Path, int]:
    """Path of each key, table and array element -> its 1-based line. `text` is valid TOML."""
    return _Scanner(text.replace("\r\n", "\n")).scan()
