"""What every parser of an output is, and what most of them are made of.

A parser gets a model's text as it comes and tells what it says. How the text was cut plays no part: the events are the
same, but for the borders between pieces of one text. Nothing is taken back, no output makes it fail, and what it holds
back is bounded by `MAX_HELD` characters. Its time is linear in the text.
"""

from __future__ import annotations

import re
import secrets
import sys
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Protocol

from lightllmd.dialogue.events import CallArguments, CallBegun, CallEnded, Content, Event, Reasoning

MAX_HELD = 1 << 14  # characters
MAX_NAME = 256  # of a tool, in an output
_MOST_SPACES = 32  # in a row, that are held back since a mark may follow


class Parser(Protocol):
    """Of one sequence."""

    reasoning: bool  # what was fed last belongs to the model's reasoning, as far as is known

    def feed(self, text: str) -> list[Event]:
        """What this text completes."""

    def end(self) -> list[Event]:
        """What is still held back, when nothing more comes. A call that is open ends."""


class PlainParser(Parser):
    """All is content."""

    reasoning = False

    def feed(self, text: str) -> list[Event]:
        return [Content(text)] if text else []

    def end(self) -> list[Event]:
        return []


class OneCall(Parser):
    """Tells of the first call only, for a client that wants no more."""

    def __init__(self, inner: Parser) -> None:
        self._inner = inner
        self.reasoning = inner.reasoning

    def feed(self, text: str) -> list[Event]:
        return self._first(self._inner.feed(text))

    def end(self) -> list[Event]:
        return self._first(self._inner.end())

    def _first(self, events: list[Event]) -> list[Event]:
        self.reasoning = self._inner.reasoning
        return [event for event in events if not getattr(event, "index", 0)]


def new_id() -> str:
    """Of a call, as OpenAI's look."""
    return f"call_{secrets.token_hex(12)}"


class Marks:
    """Finds the first of several texts, none of which another one begins with."""

    def __init__(self, marks: Iterable[str]) -> None:
        self.marks = frozenset(marks)
        self.first = frozenset(mark[0] for mark in self.marks)  # the characters that they begin with
        self._pattern = re.compile("|".join(map(re.escape, self.marks))) if self.marks else None
        self._beginnings = frozenset(mark[:size] for mark in self.marks for size in range(1, len(mark)))
        self._longest = max(map(len, self.marks), default=1)

    def find(self, text: str, end: int = sys.maxsize) -> tuple[int, str] | None:
        """Where the first one begins that is complete before `end`, and which it is."""
        found = self._pattern.search(text, 0, end) if self._pattern is not None else None
        return None if found is None else (found.start(), found.group())

    def clear(self, text: str) -> int:
        """How much of a text without marks can be no part of one, whatever follows."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self.first and text[at:] in self._beginnings:
                return at
        return len(text)


marks_of = lru_cache(256)(Marks)  # those of a format are the same for all that it parses


class MarkParser(Parser):
    """Reads texts that marks part. What stands for a state is a method that reads from the beginning of `_held` and
    says whether there is more to do before further text comes. Where it gives up a search it has looked at a number of
    characters that does not depend on how many there are.

    White space around marks is the template's, not the model's: it is no content.
    """

    def __init__(self, marks: Iterable[str], *, think: tuple[str, str] | None, inside: bool = False) -> None:
        """`marks`: those that `_on_mark` is told of. `think`: what reasoning stands between; `inside`: the output
        begins within it."""
        self._think_open, think_close = think or ("", "")
        self._marks = marks_of(frozenset([*marks, *([self._think_open] if think else [])]))
        self._think_marks = marks_of(frozenset([think_close] if think else []))
        self._held = ""
        self._spaces = inside  # white space that comes next is dropped
        self._events: list[Event] = []
        self._calls = 0
        self._call_open = False
        self._state = self._in_reasoning if inside and think else self._in_content

    @property
    def _state(self) -> Callable[[], bool]:
        return self._now

    @_state.setter
    def _state(self, state: Callable[[], bool]) -> None:
        self._now = state
        self.reasoning = state == self._in_reasoning
        self._plain: type[Content | Reasoning] | None = None  # what text is that has none of `_stops`
        if self.reasoning:
            self._plain, self._stops = Reasoning, self._think_marks.first
        elif state == self._in_content:
            self._plain, self._stops = Content, self._marks.first

    def feed(self, text: str) -> list[Event]:
        if not text:
            return []
        plain = self._plain
        if plain is None or self._held or self._spaces or text[-1].isspace() or not self._stops.isdisjoint(text):
            self._held += text
            return self._run()
        return [plain(text)]

    def end(self) -> list[Event]:
        self._run()
        self._at_end()
        return self._events

    def _run(self) -> list[Event]:
        self._events = []
        while self._held and self._now():
            pass
        return self._events

    # --- states ---------------------------------------------------------------------------------------------------

    def _in_content(self) -> bool:
        """Content up to the next mark."""
        return self._text(self._marks, Content, self._found)

    def _in_reasoning(self) -> bool:
        """Reasoning up to its end."""
        return self._text(self._think_marks, Reasoning, self._think_found)

    def _text(self, marks: Marks, kind: type[Content | Reasoning], on_mark: Callable[[str], None]) -> bool:
        held = self._held
        if self._spaces:
            held = held.lstrip()
            self._held = held
            if not held:
                return False
        found = marks.find(held)
        end = marks.clear(held) if found is None else found[0]
        # White space before a mark goes with it, so it waits for what follows. Of a long run the end alone does.
        text = held[:end]
        kept = max(len(text.rstrip()), end - _MOST_SPACES)
        if kept:
            self._spaces = False
            self._events.append(kind(held[:kept]))
        if found is None:
            self._held = held[kept:]
            return False
        self._held = held[end + len(found[1]) :]
        on_mark(found[1])
        return True

    def _found(self, mark: str) -> None:
        self._spaces = True
        if mark == self._think_open:
            self._state = self._in_reasoning
        else:
            self._on_mark(mark)

    def _think_found(self, mark: str) -> None:
        self._to_content()

    def _to_content(self) -> None:
        self._spaces = True
        self._state = self._in_content

    def _on_mark(self, mark: str) -> None:
        """A mark other than those of reasoning stood in the content; `_held` begins behind it. By itself it is no more
        than content."""
        self._spaces = False
        self._events.append(Content(mark))

    def _give_back(self, text: str) -> None:
        """What was taken for the beginning of a call is none: it is content, and what follows is looked at anew."""
        self._state, self._spaces = self._in_content, False
        if text:
            self._events.append(Content(text))

    def _at_end(self) -> None:
        """What is held becomes what it is without anything behind it."""
        held, self._held = self._held, ""
        if self._call_open:
            self._end_call()
        elif held and self._state == self._in_reasoning:
            self._events.append(Reasoning(held))
        elif held:
            self._events.append(Content(held))

    # --- calls ----------------------------------------------------------------------------------------------------

    def _begin_call(self, name: str, own_id: str | None = None) -> None:
        self._call_open = True
        self._events.append(CallBegun(self._calls, own_id or new_id(), name))

    def _add_arguments(self, text: str) -> None:
        if text:
            self._events.append(CallArguments(self._calls, text))

    def _end_call(self) -> None:
        if self._call_open:
            self._call_open = False
            self._events.append(CallEnded(self._calls))
            self._calls += 1
