"""Calls whose name stands apart from their arguments, which are a JSON text between marks.

DeepSeek V3, R1  <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f
                 ```json
                 {"a": 1}
                 ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>
DeepSeek V3.1    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>
                 <｜tool▁calls▁end｜>
Kimi K2          <|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}
                 <|tool_call_end|><|tool_calls_section_end|>
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightllmd.dialogue.json_reader import ValueReader
from lightllmd.dialogue.parser import MAX_NAME, MarkParser

_MOST_HEADER = 2 * MAX_NAME  # characters
_FENCE = "```json"
_KIMI_ID = re.compile(r"functions\.(.+):\d+", re.DOTALL)


@dataclass(frozen=True)
class NamedMarks:
    """What stands around the parts of a call."""

    open: str
    separator: str  # between the name, or what kind of call it is, and what follows
    close: str
    around: tuple[str, str]  # all calls of an answer

    @property
    def all(self) -> frozenset[str]:
        """Every one."""
        return frozenset({self.open, self.separator, self.close, *self.around})


DEEPSEEK = NamedMarks(
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
)
KIMI = NamedMarks(
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
)


class NamedParser(MarkParser):
    """Of both. Marks around all calls say nothing by themselves."""

    def __init__(self, marks: NamedMarks, *, think: tuple[str, str] | None = None, inside: bool = False) -> None:
        """See MarkParser."""
        super().__init__([marks.open, *marks.around], think=think, inside=inside)
        self._call_marks = marks
        self._raw = ""  # what would be content if it were no call
        self._before = ""  # the separator
        self._value = ValueReader()
        self._told = False  # some text of the arguments
        self._ids: set[str] = set()

    def _on_mark(self, mark: str) -> None:
        if mark == self._call_marks.open:
            self._raw = mark
            self._state = self._in_name

    def _refuse(self) -> None:
        self._raw, raw = "", self._raw
        self._give_back(raw)

    def _in_name(self) -> bool:
        """Up to the separator."""
        separator = self._call_marks.separator
        at = self._held.find(separator, 0, _MOST_HEADER)
        if at < 0:
            if len(self._held) < _MOST_HEADER:
                return False
            self._refuse()
            return True
        self._before = self._held[:at]
        self._raw += self._held[: at + len(separator)]
        self._held = self._held[at + len(separator) :]
        self._state = self._behind_separator
        return True

    def _behind_separator(self) -> bool:
        """Arguments, or a name and a line or fence after it."""
        if self._held[0] == "{":
            return self._begin(self._before)
        end = next((at for at, char in enumerate(self._held[:_MOST_HEADER]) if char in "\n`{<"), -1)
        if end < 0:
            if len(self._held) < _MOST_HEADER:
                return False
            self._refuse()
            return True
        name, self._raw, self._held = self._held[:end], self._raw + self._held[:end], self._held[end:]
        return self._begin(name)

    def _begin(self, header: str) -> bool:
        header = header.strip()
        kimi = _KIMI_ID.fullmatch(header) if self._call_marks is KIMI else None
        name = kimi[1] if kimi is not None else header.removeprefix("functions.")
        if not 1 <= len(name) <= MAX_NAME:
            self._refuse()
            return True
        own = header if kimi is not None and header not in self._ids else None
        self._ids.add(header)
        self._raw, self._told = "", False
        self._begin_call(name, own)
        self._state = self._before_arguments
        return True

    def _before_arguments(self) -> bool:
        """White space and a fence."""
        self._held = self._held.lstrip()
        if not self._held or (_FENCE.startswith(self._held) and self._held != _FENCE):
            return False
        if self._held.startswith(_FENCE):
            self._held = self._held[len(_FENCE) :]
        elif self._held[0] in "{[":
            self._value = ValueReader()
            self._state = self._in_arguments
        else:
            self._state = self._behind_arguments
        return True

    def _in_arguments(self) -> bool:
        end = self._value.read(self._held, 0)
        self._told = self._told or end > 0
        self._add_arguments(self._held[:end])
        self._held = self._held[end:]
        if not self._value.done:
            return False
        self._state = self._behind_arguments
        return True

    def _behind_arguments(self) -> bool:
        """A fence's end and the close mark; anything else is content."""
        self._held = self._held.lstrip()
        close = self._call_marks.close
        if (
            not self._held
            or ("```".startswith(self._held) and self._held != "```")
            or (close.startswith(self._held) and self._held != close)
        ):
            return False
        if self._held.startswith("```"):
            self._held = self._held[3:]
            return True
        if self._held.startswith(close):
            self._held = self._held[len(close) :]
        self._finish_call()
        self._to_content()
        return True

    def _finish_call(self) -> None:
        if self._call_open and not self._told:
            self._add_arguments("{}")
        self._end_call()

    def _at_end(self) -> None:
        if self._state == self._behind_arguments:
            self._held = ""
            self._finish_call()
        self._raw, self._held = "", self._raw + self._held
        super()._at_end()
