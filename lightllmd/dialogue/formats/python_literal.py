"""Python's literals as JSON, as they come: their grammars differ in strings, words and tuples only."""

from __future__ import annotations

import ast
import json
import re

_WORDS = {"True": "true", "False": "false", "None": "null"}
_WORD = re.compile(r"[A-Za-z0-9_.+\-]+")
_JSON_WORD = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_ESCAPE_LENGTHS = {"x": 4, "u": 6, "U": 10}
_MOST = 64  # characters of a number or word
_OPEN = {"[": "[", "{": "{", "(": "["}
_CLOSE = {"]": "]", "}": "}", ")": "]"}


class LiteralReader:
    """Of one value. `read` tells it as JSON; `done` where it has ended, before the character that says so, `broken`
    where it is no literal."""

    def __init__(self) -> None:
        self.done = self.broken = False
        self._depth = 0
        self._quote = ""  # within a string
        self._word = ""  # read so far
        self._escape = ""
        self._begun = False

    def read(self, text: str, at: int) -> tuple[int, str]:
        """How far it goes on from there, and what of it is complete."""
        out: list[str] = []
        while at < len(text) and not (self.done or self.broken):
            at = (self._string if self._quote else self._outside)(text, at, out)
        return at, "".join(out)

    def end(self) -> str:
        """What is held, when nothing more comes."""
        return self._word + self._escape

    def _string(self, text: str, at: int, out: list[str]) -> int:
        if self._escape:
            self._escape += text[at]
            length = _ESCAPE_LENGTHS.get(self._escape[1], 2)
            if len(self._escape) == length:
                out.append(_escaped(self._escape))
                self._escape = ""
            return at + 1
        ends = [end for end in (text.find(self._quote, at), text.find("\\", at)) if end >= 0]
        end = min(ends, default=len(text))
        out.append(json.dumps(text[at:end], ensure_ascii=False)[1:-1])
        if end == len(text):
            return end
        if text[end] == "\\":
            self._escape = "\\"
        else:
            self._quote = ""
            out.append('"')
            self.done = not self._depth
        return end + 1

    def _outside(self, text: str, at: int, out: list[str]) -> int:
        if (found := _WORD.match(text, at)) is not None:
            self._word += found.group()
            self._begun = True
            self.broken = len(self._word) > _MOST
            return found.end()
        if self._word:
            out.append(spoken(self._word))
            self._word = ""
            if not self._depth:
                self.done = True
                return at
        char = text[at]
        if char in "'\"":
            self._quote = char
            out.append('"')
        elif char in _OPEN:
            self._depth += 1
            out.append(_OPEN[char])
        elif char in _CLOSE and self._depth:
            self._depth -= 1
            out.append(_CLOSE[char])
            self.done = not self._depth
        elif char in ",:" and self._depth:
            out.append(char + " ")
        elif char not in " \t\r\n":
            self.broken = True
            return at
        return at + 1


def spoken(word: str) -> str:
    """A number or word of Python's or JSON's, as JSON."""
    word = _WORDS.get(word, word)
    if _JSON_WORD.fullmatch(word):
        return word
    try:
        return json.dumps(ast.literal_eval(word), allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return json.dumps(word, ensure_ascii=False)  # a name: there is nothing that it could stand for


def _escaped(escape: str) -> str:
    try:
        text = ast.literal_eval(f'"{escape}"')
        text.encode()
    except (ValueError, SyntaxError):
        text = escape
    return json.dumps(text, ensure_ascii=False)[1:-1]
