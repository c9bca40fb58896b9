"""Mistral's calls: a list of objects behind one mark, or, since tokenizer version 11, each behind a mark of its own.

[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
[TOOL_CALLS]f[CALL_ID]Ab3xY9kLm[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}
"""

from __future__ import annotations

import re
import secrets
import string

from lightllmd.dialogue.formats.tagged import TaggedParser
from lightllmd.dialogue.json_reader import ValueReader
from lightllmd.dialogue.parser import MAX_NAME

CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_ID_LENGTH = 9  # its templates take no other
_MOST_HEADER = 2 * MAX_NAME  # characters
_HEADER = re.compile(r"\s*([^\[\]{}\s]+)\s*(?:\[CALL_ID\]\s*([a-zA-Z0-9]+)\s*)?", re.DOTALL)


def mistral_id() -> str:
    """Of a call: nine letters and digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(_ID_LENGTH))


class MistralParser(TaggedParser):
    """Both forms, whichever comes."""

    def __init__(self, *, think: tuple[str, str] | None = None, inside: bool = False) -> None:
        """See MarkParser."""
        super().__init__(CALLS, think=think, inside=inside)
        self._value = ValueReader()

    def _new_id(self) -> str:
        return mistral_id()

    def _before_calls(self) -> bool:
        if self._held[0].isspace() or self._held[0] in "[{":
            return super()._before_calls()
        self._state = self._in_header
        return True

    def _in_header(self) -> bool:
        """The name, and perhaps an id, up to the arguments."""
        found = [at for mark in (ARGS, "{") if (at := self._held.find(mark, 0, _MOST_HEADER)) >= 0]
        if not found:
            if len(self._held) < _MOST_HEADER:
                return False
            self._give_back(self._held_raw())
            return True
        header = _HEADER.fullmatch(self._held[: min(found)])
        if header is None or len(header[1]) > MAX_NAME:
            self._give_back(self._held_raw())
            return True
        self._held_raw()
        self._held = self._held[min(found) :].removeprefix(ARGS)
        self._begin_call(header[1], header[2] if header[2] and len(header[2]) == _ID_LENGTH else self._new_id())
        self._value = ValueReader()
        self._state = self._in_arguments
        return True

    def _in_arguments(self) -> bool:
        if self._value.done:
            self._end_call()
            self._to_content()
            return True
        end = self._value.read(self._held, 0)
        self._add_arguments(self._take(end))
        return self._value.done

    def _own_id(self, reader: object) -> str:
        return self._new_id()

    def _at_end(self) -> None:
        if self._state == self._in_arguments:
            self._end_call()
        super()._at_end()
