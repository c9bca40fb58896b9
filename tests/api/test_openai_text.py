"""How the OpenAI routes turn tokens into text, where that differs from the native ones."""

from __future__ import annotations

from types import SimpleNamespace

from api.frontend_harness import make_plan
from lightllmd.api.intake import Intake
from lightllmd.api.openai import job
from lightllmd.api.openai_bodies import ChatBody, CompletionBody
from lightllmd.text import ByteTokenizer


def test_nothing_is_put_around_added_tokens_and_stops_are_left_out() -> None:
    intake = Intake(make_plan(), ByteTokenizer)
    front = SimpleNamespace(limits=intake.limits, intake=intake)
    for body in (CompletionBody(prompt="x", stop="y"), ChatBody(messages=[{"role": "user", "content": "x"}], stop="y")):
        text = job(front, body, [1, 2], [], "prompt", heals=False).text
        assert not text.spaces_between_special_tokens
        assert not text.include_stop
        assert text.stop_strings == ["y"]
