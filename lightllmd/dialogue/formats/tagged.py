"""Calls as JSON objects behind a mark: one each, or a list of them. Hermes 2 Pro has made this usual, Qwen2.5 and Qwen3
write it, too; others differ in the marks and keys.

    <tool_call>
    {"name": "f", "arguments": {"a": 1}}
    </tool_call>
"""

from __future__ import annotations

from collections.abc import Sequence

from lightllmd.dialogue.json_reader import CallReader
from lightllmd.dialogue.parser import MAX_HELD, MarkParser


class TaggedParser(MarkParser):
    """After `open` comes an object or a list of them, then `close` where there is one."""

    def __init__(
        self,
        open: str,  # noqa: A002
        close: str = "",
        *,
        think: tuple[str, str] | None = None,
        inside: bool = False,
        names: Sequence[str] = ("name",),
        arguments: Sequence[str] = ("arguments", "parameters"),
        others: Sequence[str] = (),
    ) -> None:
        """`names`, `arguments`: the keys of an object; `others`: further marks; otherwise see MarkParser."""
        super().__init__([open, *others], think=think, inside=inside)
        self._close = close
        self._keys = (names, arguments)
        self._raw: list[str] = []  # what would be content if it were no call
        self._raw_size = 0
        self._reader = CallReader()
        self._listed = False

    def _on_mark(self, mark: str) -> None:
        self._listed = False
        self._hold(mark)
        self._state = self._before_calls

    def _hold(self, text: str) -> None:
        self._raw.append(text)
        self._raw_size += len(text)

    def _held_raw(self) -> str:
        raw, self._raw, self._raw_size = "".join(self._raw), [], 0
        return raw

    def _take(self, size: int) -> str:
        taken, self._held = self._held[:size], self._held[size:]
        return taken

    def _before_calls(self) -> bool:
        """Behind the mark."""
        if self._held[0].isspace():
            self._skip_spaces()
        elif self._held[0] == "[" and not self._listed:
            self._listed = True
            self._hold(self._take(1))
        else:
            self._next_call()
        return True

    def _skip_spaces(self) -> None:
        spaces = len(self._held) - len(self._held.lstrip())
        if not self._raw:
            self._take(spaces)
        elif self._raw_size < MAX_HELD:
            self._hold(self._take(min(spaces, MAX_HELD - self._raw_size)))
        else:
            self._give_back(self._held_raw())

    def _next_call(self) -> None:
        self._reader = CallReader(*self._keys)
        self._state = self._in_call

    def _in_call(self) -> bool:
        reader = self._reader
        if self._call_open:
            self._take(reader.read(self._held, 0))
        else:
            self._hold(self._take(reader.read(self._held[: MAX_HELD - self._raw_size], 0)))
            if self._begins(reader):
                self._held_raw()
                self._begin_call(str(reader.name), self._own_id(reader))
            elif reader.broken or reader.done or self._raw_size == MAX_HELD:
                self._give_back(self._held_raw())
                return True
            else:
                return False
        pieces, reader.pieces = reader.pieces, []
        for piece in pieces:
            self._add_arguments(piece)
        if reader.broken or reader.done:
            self._end_call()
            self._state = self._after_call
        return bool(self._held)

    def _begins(self, reader: CallReader) -> bool:
        """Whether it is certain now that this is a call."""
        return reader.begun

    def _own_id(self, reader: CallReader) -> str | None:
        """That the model gave the call."""
        return None

    def _after_call(self) -> bool:
        """Behind an object."""
        if self._held[0].isspace():
            self._skip_spaces()
        elif self._listed and self._held[0] == ",":
            self._take(1)
            self._state = self._before_next
        elif self._listed and self._held[0] == "]":
            self._take(1)
            self._listed = False
        elif self._close and self._held.startswith(self._close):
            self._take(len(self._close))
            self._to_content()
        elif self._close and self._close.startswith(self._held):
            return False
        else:
            self._to_content()
        return True

    def _before_next(self) -> bool:
        """Behind a comma of a list."""
        if self._held[0].isspace():
            self._skip_spaces()
        else:
            self._next_call()
        return True

    def _at_end(self) -> None:
        if self._call_open:
            self._add_arguments(self._reader.rest())
        self._held = self._held_raw() + self._held
        super()._at_end()
