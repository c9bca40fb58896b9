"""Llama 3's calls: an answer that is an object, or several. The mark before them may be missing, so that an object of
which it is not known that it is a call of a tool is content, such as an answer in JSON.

    <|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}
"""

from __future__ import annotations

from collections.abc import Collection

from lightllmd.dialogue.formats.tagged import TaggedParser
from lightllmd.dialogue.json_reader import CallReader
from lightllmd.dialogue.parser import MAX_HELD

PYTHON_TAG = "<|python_tag|>"
_LLAMA_4 = ("<|python_start|>", "<|python_end|>")  # the same, since Llama 4


class BareParser(TaggedParser):
    """Objects at the beginning of the answer, or behind the mark."""

    def __init__(self, tools: Collection[str], *, think: tuple[str, str] | None = None, inside: bool = False) -> None:
        """`tools`: the names that a call may have; otherwise see MarkParser."""
        super().__init__(PYTHON_TAG, think=think, inside=inside, others=_LLAMA_4)
        self._tools = frozenset(tools)
        if not inside:
            self._state = self._at_start

    def _on_mark(self, mark: str) -> None:
        if mark != _LLAMA_4[1]:
            super()._on_mark(mark)

    def _to_content(self) -> None:
        super()._to_content()
        if not self._calls:
            self._state = self._at_start  # behind reasoning

    def _at_start(self) -> bool:
        """Before anything was said."""
        if self._held[0].isspace():
            spaces = len(self._held) - len(self._held.lstrip())
            self._hold(self._take(min(spaces, MAX_HELD - self._raw_size)))
            if self._raw_size == MAX_HELD:
                self._give_back(self._held_raw())
        elif self._held[0] == "{":
            self._next_call()
        else:
            spaces = self._held_raw()
            self._state = self._in_content
            self._held = ("" if self._spaces else spaces) + self._held
        return True

    def _begins(self, reader: CallReader) -> bool:
        return reader.begun and reader.has_arguments and reader.name in self._tools

    def _after_call(self) -> bool:
        if self._held[0].isspace():
            self._skip_spaces()
        elif self._held[0] in ";,":
            self._take(1)
            self._state = self._before_next
        elif self._held[0] == "{":
            self._next_call()
        else:
            self._to_content()
        return True

    def _before_next(self) -> bool:
        """Behind what parts two objects."""
        if self._held[0].isspace():
            self._skip_spaces()
        elif self._held[0] == "{":
            self._next_call()
        else:
            self._to_content()
        return True
