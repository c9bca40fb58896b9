"""Calls as Gemma 4 writes them: keys without quotes, texts between marks, all else as JSON.

<|tool_call>call:f{a:1,b:<|"|>x<|"|>,c:{d:[true]}}<tool_call|>
"""

from __future__ import annotations

import json
import re

from lightllmd.dialogue.formats.python_literal import spoken
from lightllmd.dialogue.parser import MAX_NAME, MarkParser

OPEN, CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
MARKS = frozenset({OPEN, CLOSE, QUOTE})
_CALL = "call:"
_WORD = re.compile(r"[A-Za-z0-9_.+\-]+")
_NAME = re.compile(r"[\w.\-]*")
_KEY = re.compile(r"[^:{}\[\],<]+")
_CLOSERS = {"{": "}", "[": "]"}


class ObjectReader:
    """Of one object, from its brace on. `read` tells it as JSON; `done` behind its end, `broken` where it is none."""

    def __init__(self) -> None:
        self.done = self.broken = False
        self._open: list[str] = []  # braces and brackets
        self._key: str | None = None  # as far as it was read, where one may come
        self._word = ""  # a number, or true, false, null; as far as it was read
        self._quoted = False  # within a text
        self._filled = False  # a value has ended, and no comma follows it yet
        self._bare = False  # behind a brace or bracket, which may close at once

    def read(self, text: str, at: int) -> tuple[int, str]:
        """How far it goes on from there, and what of it is complete. What may be the beginning of a mark is left."""
        out: list[str] = []
        while at < len(text) and not (self.done or self.broken):
            if self._quoted:
                end = text.find(QUOTE, at)
                whole = end >= 0
                end = end if whole else len(text) - _begun(text[at:])
                out.append(_in_string(text[at:end]))
                at = end
                if not whole:
                    break
                out.append('"')
                at, self._quoted, self._filled = at + len(QUOTE), False, True
            elif self._key is not None:
                at = self._read_key(text, at, out)
            elif text[at] == "<" and not (self._word or self._filled):
                if not text.startswith(QUOTE, at):
                    self.broken = not QUOTE.startswith(text[at:])
                    break
                out.append('"')
                at, self._quoted, self._bare = at + len(QUOTE), True, False
            else:
                at = self._read_value(text, at, out)
        return at, "".join(out)

    def end(self, held: str) -> str:
        """What is complete now that nothing comes behind `held`."""
        return _in_string(held) if self._quoted else self._word

    def _read_key(self, text: str, at: int, out: list[str]) -> int:
        found = _KEY.match(text, at)
        if found is not None:
            self._key = (self._key or "") + found.group()
            self.broken = len(self._key) > MAX_NAME
            return found.end()
        key = (self._key or "").strip()
        if text[at] == ":" and key:
            out.append(json.dumps(key, ensure_ascii=False) + ": ")
            self._key, self._bare = None, False
        elif text[at] == "}" and not key and self._bare:
            self._key = None
            self._close(out)
        else:
            self.broken = True
            return at
        return at + 1

    def _read_value(self, text: str, at: int, out: list[str]) -> int:
        if not self._filled and (found := _WORD.match(text, at)) is not None and self._open:
            self._word += found.group()
            self._bare = False
            self.broken = len(self._word) > MAX_NAME
            return found.end()
        if self._word:
            out.append(spoken(self._word))
            self._word, self._filled = "", True
        char, inner = text[at], self._open[-1] if self._open else ""
        if char in _CLOSERS and not self._filled and (inner or char == "{"):
            self._open.append(char)
            out.append(char)
            self._bare, self._key = True, "" if char == "{" else None
        elif inner and char == _CLOSERS[inner] and (self._filled or self._bare):
            self._close(out)
        elif char == "," and self._filled and inner:
            out.append(", ")
            self._filled, self._key = False, "" if inner == "{" else None
        elif not char.isspace():
            self.broken = True
            return at
        return at + 1

    def _close(self, out: list[str]) -> None:
        out.append(_CLOSERS[self._open.pop()])
        self._filled, self._bare = True, False
        self.done = not self._open


def _begun(text: str) -> int:
    """Characters at the end of `text` that may be the beginning of a mark."""
    return next((size for size in range(min(len(text), len(QUOTE) - 1), 0, -1) if QUOTE.startswith(text[-size:])), 0)


def _in_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


class GemmaParser(MarkParser):
    """One call between two marks."""

    def __init__(self, *, think: tuple[str, str] | None = None, inside: bool = False) -> None:
        """See MarkParser."""
        super().__init__([OPEN], think=think, inside=inside)
        self._object = ObjectReader()

    def _on_mark(self, mark: str) -> None:
        self._state = self._in_name

    def _in_name(self) -> bool:
        """From behind the mark up to the arguments."""
        head, held = self._held[: len(_CALL)], self._held
        found = _NAME.match(held, len(_CALL))
        end = found.end() if found is not None and head == _CALL else 0
        if len(held) <= MAX_NAME and (_CALL.startswith(held) if end == 0 else end == len(held)):
            return False
        if not len(_CALL) < end <= MAX_NAME or held[end : end + 1] != "{":
            self._give_back(OPEN)
            return True
        self._begin_call(held[len(_CALL) : end])
        self._held, self._object, self._state = held[end:], ObjectReader(), self._in_arguments
        return True

    def _in_arguments(self) -> bool:
        at, told = self._object.read(self._held, 0)
        self._held = self._held[at:]
        self._add_arguments(told)
        if self._object.broken:
            self._add_arguments(self._object.end(""))
            self._end_call()
            self._to_content()
            return True
        if self._object.done:
            self._end_call()
            self._state = self._behind_call
            return True
        return False

    def _behind_call(self) -> bool:
        self._held = held = self._held.lstrip()
        if not held or (CLOSE.startswith(held) and held != CLOSE):
            return False
        self._held = held.removeprefix(CLOSE)
        self._to_content()
        return True

    def _at_end(self) -> None:
        if self._call_open:
            self._add_arguments(self._object.end(self._held))
            self._held = ""
        elif self._state == self._in_name:
            self._held = OPEN + self._held
        super()._at_end()
