"""What goes wrong is told in a sentence, and takes nothing of the conversation."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from page.browser import Tab, stream

REFUSALS = {
    "OpenAI's": (400, {"error": {"message": "messages: too long", "type": "x"}}, {}, "Messages: too long."),
    "native": (
        503,
        {"message": "the server is draining"},
        {"Retry_After": "5"},
        "The server is draining. Try again in 5 s.",
    ),
    "TGI's": (429, {"error": "Model is overloaded", "error_type": "overloaded"}, {}, "Model is overloaded."),
    "a proxy's": (502, "<h1>Bad gateway</h1>", {}, "The server answered with an error (502)."),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_is_a_sentence_and_the_question_stays(tab: Callable[..., Tab], kind: str) -> None:
    status, body, headers, sentence = REFUSALS[kind]
    one = tab(expected=(f"status of {status}",))
    one.replies(body if isinstance(body, str) else json.dumps(body), status, **headers)
    one.ask("refuse me")
    one.page.wait_for_function("() => document.getElementById('trouble').textContent")
    assert one.page.inner_text("#trouble") == sentence
    assert one.page.input_value("#question") == "refuse me"
    assert one.page.locator("#log > li").count() == 0


def test_what_the_server_itself_refuses_is_shown(tab: Callable[..., Tab]) -> None:
    one = tab(expected=("status of 400",))
    one.ask("x", max_tokens="5000")
    one.page.wait_for_function("() => document.getElementById('trouble').textContent")
    assert "max_req_total_len = 3072" in one.page.inner_text("#trouble")


def test_an_answer_that_breaks_off_says_so_and_stays(tab: Callable[..., Tab]) -> None:
    one = tab()
    error = 'data: {"error": {"message": "the engine broke off this request"}}\n\ndata: [DONE]\n\n'
    for count, (end, sentence) in enumerate(
        [("", "The connection broke off before the answer's end."), (error, "The engine broke off this request.")], 1
    ):
        one.replies(stream({"content": "half an answ"}, end=end))
        one.ask("go on")
        one.finished(count)
        assert one.page.locator("#log li.answered .trouble").last.inner_text() == sentence
        assert one.answer == "half an answ"


def test_a_server_that_is_gone_is_told_of(tab: Callable[..., Tab]) -> None:
    one = tab(expected=("ERR_INTERNET_DISCONNECTED",))
    one.context.set_offline(True)
    one.ask("anybody there?")
    one.page.wait_for_function("() => document.getElementById('trouble').textContent")
    assert one.page.inner_text("#trouble") == "The server can't be reached."
    one.page.wait_for_selector("#stale:visible")
    assert "The server doesn't answer." in one.page.inner_text("#stale")
    one.context.set_offline(False)
    one.page.wait_for_selector("#stale", state="hidden")


def test_parameters_out_of_bounds_are_not_sent(tab: Callable[..., Tab]) -> None:
    one = tab()
    one.ask("x", top_p="1.5")
    assert one.page.locator("#parameters").get_attribute("open") is not None
    assert one.page.evaluate("document.activeElement.id") == "top-p"
    assert one.page.input_value("#question") == "x"
    assert one.page.locator("#log > li").count() == 0
