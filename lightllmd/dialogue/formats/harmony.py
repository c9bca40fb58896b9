"""OpenAI's harmony, which gpt-oss writes: messages, each with a channel, and with a recipient if it is a call.
Source: https://cookbook.openai.com/articles/openai-harmony.

    <|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary to=functions.f
    <|constrain|>json<|message|>{"a": 1}<|call|>
    <|channel|>final<|message|>It rains.<|return|>

The prompt ends with ``<|start|>assistant``, so that the output begins within a header.
"""

from __future__ import annotations

import re

from lightllmd.dialogue.events import Content, Reasoning
from lightllmd.dialogue.parser import MAX_NAME, MarkParser, marks_of

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
MARKS = frozenset({START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN})
_HEADER_BEGINNINGS = (START, CHANNEL, CONSTRAIN, MESSAGE, " to=", "to=")
_MOST_HEADER = 2 * MAX_NAME
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=functions\.([^\s<]+)")
_ELSEWHERE = re.compile(r"\bto=(?!functions\.)")  # to a tool of OpenAI's own, which is not run here


class HarmonyParser(MarkParser):
    """`calls`: those of functions are told as such; `apart`: reasoning is told apart from content."""

    def __init__(self, *, calls: bool, apart: bool) -> None:
        super().__init__([START, CHANNEL], think=None)
        self._finds_calls = calls
        self._apart = apart
        self._body_marks = marks_of(frozenset({START, END, CALL, RETURN}))
        self._header = ""
        self._kind: type[Content | Reasoning] | None = Content  # of the body; None: arguments
        self._said: set[type[Content | Reasoning]] = set()
        self._line = False  # a line break parts the body from the message of the same kind before it
        self._told = False  # some text of the arguments
        self._state = self._at_start

    def _at_start(self) -> bool:
        """The rest of the header that the prompt began."""
        if any(self._held.startswith(mark) for mark in _HEADER_BEGINNINGS):
            self._header = ""
            self._state = self._in_header
        elif any(mark.startswith(self._held) for mark in _HEADER_BEGINNINGS):
            return False
        else:
            self._begin_body(Content)
        return True

    def _in_header(self) -> bool:
        at = self._held.find(MESSAGE, 0, _MOST_HEADER)
        if at < 0:
            if len(self._held) < _MOST_HEADER:
                return False
            self._begin_body(Content)
            mark = next((one for one in (START, CHANNEL) if self._held.startswith(one)), "")
            self._held = self._held[len(mark) :]
            self._say(mark)
            return True
        header, self._held = self._held[:at], self._held[at + len(MESSAGE) :]
        channel = _CHANNEL_NAME.search(header)
        name = channel[1] if channel is not None else "final"
        recipient = _RECIPIENT.search(header) if self._finds_calls else None
        if recipient is not None and len(recipient[1]) <= MAX_NAME:
            self._begin_call(recipient[1])
            self._kind, self._told = None, False
            self._state = self._in_body
        elif name == "analysis" or _ELSEWHERE.search(header):
            self._begin_body(Reasoning if self._apart else Content)
        else:
            self._begin_body(Content)
        return True

    def _begin_body(self, kind: type[Content | Reasoning]) -> None:
        self._kind = kind
        self._line = kind in self._said
        self._state = self._in_body
        self.reasoning = kind is Reasoning

    def _in_body(self) -> bool:
        held = self._held
        found = self._body_marks.find(held)
        end = self._body_marks.clear(held) if found is None else found[0]
        self._say(held[:end])
        self._held = held[end:]
        if found is None:
            return False
        if found[1] != START:
            self._held = held[end + len(found[1]) :]
        self._end_body()
        self._state = self._between
        return True

    def _say(self, text: str) -> None:
        if not text:
            return
        if self._kind is None:
            self._told = True
            self._add_arguments(text)
            return
        if self._line:
            text, self._line = "\n" + text, False
        self._plain, self._stops = self._kind, self._body_marks.first
        self._said.add(self._kind)
        self._events.append(self._kind(text))

    def _end_body(self) -> None:
        if self._call_open and not self._told:
            self._add_arguments("{}")
        self._end_call()

    def _between(self) -> bool:
        """Behind a message."""
        if self._held.startswith((START, CHANNEL)):
            self._state = self._in_header
        elif START.startswith(self._held) or CHANNEL.startswith(self._held):
            return False
        else:
            self._begin_body(Content)
        return True

    def _at_end(self) -> None:
        held, self._held = self._held, ""
        if self._state == self._in_body:
            self._say(held)
        elif held:
            self._kind = Content
            self._say(held)
        self._end_call()
