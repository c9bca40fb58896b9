"""Calls as Python writes them: an answer that is a list of calls. Llama 3.2 and 4 write it, the latter perhaps between
two marks.

    [f(a=1, b="x"), g()]
"""

from __future__ import annotations

import json
from collections.abc import Collection

from lightllmd.dialogue.formats.python_literal import LiteralReader
from lightllmd.dialogue.parser import MAX_HELD, MAX_NAME, MarkParser

START, END = "<|python_start|>", "<|python_end|>"


class PythonicParser(MarkParser):
    """A list at the beginning of the answer. Where its first word is no tool's name it is content, as any list."""

    def __init__(self, tools: Collection[str], *, think: tuple[str, str] | None = None, inside: bool = False) -> None:
        """`tools`: the names that a call may have; otherwise see MarkParser."""
        super().__init__([START, END], think=think, inside=inside)
        self._tools = frozenset(tools)
        self._raw = ""  # what would be content if it were no call
        self._literal = LiteralReader()
        self._arguments = 0  # of the call that were begun
        if not inside:
            self._state = self._at_start

    def _to_content(self) -> None:
        super()._to_content()
        if not self._calls:
            self._state = self._at_start

    def _on_mark(self, mark: str) -> None:
        self._state = self._at_start if mark == START else self._in_content

    def _at_start(self) -> bool:
        """Before anything was said."""
        spaces = min(len(self._held) - len(self._held.lstrip()), MAX_HELD - len(self._raw))
        self._raw += self._held[:spaces]
        self._held = self._held[spaces:]
        if len(self._raw) == MAX_HELD:
            self._refuse()
        elif self._held.startswith("["):
            self._raw += "["
            self._held = self._held[1:]
            self._state = self._in_name
        elif self._held:
            self._held = ("" if self._spaces else self._raw) + self._held
            self._raw = ""
            self._state = self._in_content
        return True

    def _refuse(self) -> None:
        self._raw, raw = "", self._raw
        self._give_back(raw)

    def _in_name(self) -> bool:
        """Up to the parenthesis, at the beginning or behind a comma."""
        end = self._held.find("(", 0, MAX_NAME)
        if (
            end < 0
            and len(self._held) <= MAX_NAME
            and all(c.isspace() or c.isalnum() or c in "_.-" for c in self._held)
        ):
            return False
        name = self._held[: max(end, 0)].strip()
        if name not in self._tools:
            if self._calls:
                self._to_content()
            else:
                self._refuse()
            return True
        self._held, self._raw = self._held[end + 1 :], ""
        self._arguments = 0
        self._begin_call(name)
        self._state = self._before_argument
        return True

    def _before_argument(self) -> bool:
        """Behind a parenthesis or comma."""
        self._held = self._held.lstrip()
        if not self._held:
            return False
        if self._held[0] == ")":
            return self._close()
        end = self._held.find("=", 0, MAX_NAME)
        if end < 0 and _may_be_word(self._held):
            return False
        key = self._held[: max(end, 0)].strip()
        if not key.isidentifier():
            return self._break_off()
        self._held = self._held[end + 1 :]
        self._add_arguments(("{" if not self._arguments else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
        self._arguments += 1
        self._literal = LiteralReader()
        self._state = self._in_value
        return True

    def _in_value(self) -> bool:
        at, told = self._literal.read(self._held, 0)
        self._held = self._held[at:]
        self._add_arguments(told)
        if self._literal.broken:
            self._add_arguments(self._literal.end())
            return self._break_off()
        if self._literal.done:
            self._state = self._behind_value
        return self._literal.done

    def _behind_value(self) -> bool:
        self._held = self._held.lstrip()
        if not self._held:
            return False
        if self._held[0] == ",":
            self._held = self._held[1:]
            self._state = self._before_argument
            return True
        return self._close() if self._held[0] == ")" else self._break_off()

    def _close(self) -> bool:
        self._held = self._held[1:]
        self._add_arguments("}" if self._arguments else "{}")
        self._end_call()
        self._state = self._behind_call
        return True

    def _break_off(self) -> bool:
        self._add_arguments("" if self._arguments else "{}")
        self._end_call()
        self._to_content()
        return True

    def _behind_call(self) -> bool:
        self._held = self._held.lstrip()
        if not self._held:
            return False
        if self._held[0] == ",":
            self._held = self._held[1:]
            self._state = self._in_name
        else:
            self._held = self._held.removeprefix("]")
            self._to_content()
        return True

    def _at_end(self) -> None:
        if self._call_open and self._state == self._in_value:
            self._add_arguments(self._literal.end())
        elif not self._call_open:
            self._raw, self._held = "", self._raw + self._held
        super()._at_end()


def _may_be_word(text: str) -> bool:
    """With white space around it."""
    return len(text) < MAX_NAME and all(char.isspace() or char.isalnum() or char in "_.-" for char in text)
