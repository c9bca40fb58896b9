"""How the OpenAI routes turn tokens into text, where that differs from the native ones."""

from __future__ import annotations

from types import SimpleNamespace

from lightllmd.api.limits import Limits
from lightllmd.api.openai import job
from lightllmd.api.openai_bodies import ChatBody, CompletionBody


def test_nothing_is_put_around_added_tokens_and_stops_are_left_out() -> None:
    front = SimpleNamespace(limits=Limits(100, 200, 1000, 10, 10, 300, None))
    for body in (CompletionBody(prompt="x", stop="y"), ChatBody(messages=[{"role": "user", "content": "x"}], stop="y")):
        text = job(front, body, [1, 2], "prompt").text
        assert not text.spaces_between_special_tokens
        assert not text.include_stop
        assert text.stop_strings == ["y"]
