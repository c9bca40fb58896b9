"""Reads JSON as it comes: where a value ends, and what a call that is written as an object says.

What is read is not checked beyond that: the arguments of a call are told as the model wrote them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from lightllmd.dialogue.parser import MAX_HELD, MAX_NAME

_STRUCTURE = re.compile(r'["{}\[\]<`]')  # no JSON has the last two outside a string: it has been broken off
_IN_STRING = re.compile(r'["\\]')
_SCALAR_END = re.compile(r'[\s,:"{}\[\]<`;]')
_SPACE = " \t\n\r"


class ValueReader:
    """Of one JSON value, which begins with the first character that is read."""

    def __init__(self) -> None:
        self.done = False  # nothing that comes belongs to it
        self.broken = False  # it is done, but no JSON
        self._depth = 0
        self._in_string = self._escaped = self._begun = self._scalar = False

    def read(self, text: str, at: int) -> int:
        """How far the value goes on from there; `done` if that is its end."""
        if not self._begun:
            self._begun = True
            self._scalar = text[at] not in '"{['
            if self._scalar and _SCALAR_END.match(text[at]):
                self.done = self.broken = True
                return at
        if self._scalar:
            found = _SCALAR_END.search(text, at)
            self.done = found is not None
            return len(text) if found is None else found.start()
        while at < len(text):
            at = self._string(text, at) if self._in_string else self._container(text, at)
            if self.done:
                break
        return at

    def _string(self, text: str, at: int) -> int:
        if self._escaped:
            self._escaped = False
            return at + 1
        found = _IN_STRING.search(text, at)
        if found is None:
            return len(text)
        if found.group() == "\\":
            self._escaped = True
        else:
            self._in_string = False
            self.done = not self._depth
        return found.end()

    def _container(self, text: str, at: int) -> int:
        found = _STRUCTURE.search(text, at)
        if found is None:
            return len(text)
        mark = found.group()
        if mark in "<`":
            self.done = self.broken = True
            return found.start()
        if mark == '"':
            self._in_string = True
        elif mark in "{[":
            self._depth += 1
        else:
            self._depth -= 1
            self.done = self._depth == 0
        return found.end()


_ESCAPE = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.", re.DOTALL)
_HIGH = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")  # the first half of a pair


class StringText:
    """The text that a JSON string stands for, as it comes. An escape that is none stays as it is."""

    def __init__(self) -> None:
        self._held = ""
        self._begun = False

    def read(self, piece: str, *, last: bool) -> str:
        """`piece`: more of the string as it is written, quotes included; `last`: it ends with the closing one."""
        if not self._begun:
            self._begun = True
            piece = piece[1:]
        return self._read(self._held + (piece[:-1] if last else piece), last)

    def rest(self) -> str:
        """What is held, when nothing more comes."""
        return self._read(self._held, True)

    def _read(self, held: str, last: bool) -> str:
        out: list[str] = []
        at = 0
        while (found := held.find("\\", at)) >= 0:
            out.append(held[at:found])
            at = found
            if not last and len(held) - at < _escape_length(held, at):
                break
            escape = _ESCAPE.match(held, at)
            out.append(held[at] if escape is None else _unescaped(escape.group()))
            at = at + 1 if escape is None else escape.end()
        else:
            out.append(held[at:])
            at = len(held)
        self._held = held[at:]
        return "".join(out)


def _escape_length(held: str, at: int) -> int:
    """Characters that have to be there before it is known what an escape stands for."""
    if held[at + 1 : at + 2] != "u":
        return 2
    return 12 if _HIGH.match(held, at) else 6


def _unescaped(escape: str) -> str:
    try:
        text = json.loads(f'"{escape}"')
        text.encode()
    except ValueError:
        return escape
    return str(text)


class CallReader:
    """A call that is written as an object: which tool, and the arguments as they come.

    Keys may stand in any order; arguments that stand before the name are held until it is known. `begun`, `done` and
    `broken` are to be looked at after each `read`."""

    def __init__(
        self, names: Sequence[str] = ("name",), arguments: Sequence[str] = ("arguments", "parameters")
    ) -> None:
        """The keys, by what they mean."""
        self._name_keys, self._argument_keys = frozenset(names), frozenset(arguments)
        self.name: str | None = None
        self.id: str | None = None
        self.has_arguments = False  # their key was there
        self.done = False  # the object is complete
        self.broken = False  # it is no such object, or it breaks off; it ended before the character that was read last
        self.pieces: list[str] = []  # new text of the arguments; the reader takes them away
        self._expects = self._open
        self._value = ValueReader()
        self._raw: list[str] = []  # of a key, of a value that is held
        self._held = 0  # characters of `_raw`, and of arguments before the name
        self._key = ""
        self._string: StringText | None = None  # arguments that are written as a string
        self._empty = True  # no argument text so far
        self._null = ""  # what arguments of null have begun with

    def read(self, text: str, at: int) -> int:
        """Reads on; returns how far. Less than all only if it is `done` or `broken`."""
        while at < len(text) and not (self.done or self.broken):
            if text[at] in _SPACE and self._expects not in (self._in_key, self._in_value):
                at += 1
            else:
                at = self._expects(text, at)
        return at

    @property
    def begun(self) -> bool:
        """The name is known."""
        return self.name is not None

    def rest(self) -> str:
        """Arguments that are held, when nothing more comes."""
        held, self._null = self._null, ""
        return held + (self._string.rest() if self._string is not None else "")

    def _fail(self, at: int) -> int:
        self.broken = True
        return at

    def _open(self, text: str, at: int) -> int:
        if text[at] != "{":
            return self._fail(at)
        self._expects = self._first_key
        return at + 1

    def _first_key(self, text: str, at: int) -> int:
        return self._close(at) if text[at] == "}" else self._before_key(text, at)

    def _before_key(self, text: str, at: int) -> int:
        if text[at] != '"':
            return self._fail(at)
        self._value, self._raw = ValueReader(), []
        self._expects = self._in_key
        return at

    def _in_key(self, text: str, at: int) -> int:
        end = self._value.read(text, at)
        self._keep(text[at:end])
        if self._value.done and not self.broken:
            key = _loaded("".join(self._raw))
            self._key = key if isinstance(key, str) else ""
            self._held -= sum(map(len, self._raw))
            self._expects = self._colon
        return end

    def _colon(self, text: str, at: int) -> int:
        if text[at] != ":":
            return self._fail(at)
        self._expects = self._before_value
        return at + 1

    def _before_value(self, text: str, at: int) -> int:
        self._value, self._raw = ValueReader(), []
        self._expects = self._in_value
        if self._key in self._argument_keys and not self.has_arguments:
            self.has_arguments = True
            self._string = StringText() if text[at] == '"' else None
        elif self._key in self._argument_keys:
            self._key = ""  # a second time: no more than any other key
        return self._in_value(text, at)

    def _in_value(self, text: str, at: int) -> int:
        value = self._value
        end = value.read(text, at)
        piece = text[at:end]
        if self._key in self._argument_keys:
            self._argue(piece)
        elif self._key in self._name_keys or self._key == "id":
            self._keep(piece)
        if value.broken:
            return self._fail(end)
        if value.done:
            self._take_value()
            self._expects = self._after_value
        return end

    def _argue(self, piece: str) -> None:
        if self._string is not None:
            piece = self._string.read(piece, last=self._value.done and not self._value.broken)
        elif self._null or (self._empty and piece[:1] == "n"):
            # null says that there are none
            self._null += piece
            if self._value.done and self._null == "null":
                return
            if not self._value.done and len(self._null) <= 4:
                return
            piece, self._null = self._null, ""
        if piece:
            self._empty = False
            self.pieces.append(piece)
            if not self.begun:
                self._count(len(piece))

    def _take_value(self) -> None:
        if self._key in self._argument_keys:
            return
        value = _loaded("".join(self._raw)) if self._raw else None
        self._held -= sum(map(len, self._raw))
        if self._key in self._name_keys and not self.begun:
            if isinstance(value, str) and 1 <= len(value) <= MAX_NAME:
                self.name = value
            else:
                self.broken = True
        elif self._key == "id" and isinstance(value, str) and 1 <= len(value) <= MAX_NAME:
            self.id = value

    def _after_value(self, text: str, at: int) -> int:
        if text[at] == ",":
            self._expects = self._before_key
            return at + 1
        return self._close(at) if text[at] == "}" else self._fail(at)

    def _close(self, at: int) -> int:
        if not self.begun:
            return self._fail(at)
        if self._empty:
            self.pieces.append("{}")
        self.done = True
        return at + 1

    def _keep(self, piece: str) -> None:
        self._raw.append(piece)
        self._count(len(piece))

    def _count(self, characters: int) -> None:
        self._held += characters
        if self._held > MAX_HELD:
            self.broken = True


def _loaded(text: str) -> object:
    try:
        return json.loads(text, strict=False)
    except ValueError:
        return None
