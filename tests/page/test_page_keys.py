"""Where API keys are required."""

from __future__ import annotations

from collections.abc import Callable

from harness import Daemon
from page.browser import GREEDY, Tab


def test_a_key_lives_in_its_tab_alone(tab: Callable[..., Tab], locked: Daemon) -> None:
    one = tab(locked.url + "/", expected=("status of 401",))
    page = one.page
    assert page.inner_text("#health-word") == "Ready"
    assert not page.locator("#figures").is_visible()
    assert not page.locator("#conversation").is_visible()
    page.fill("#key", "wrong-key")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.getElementById('key-trouble').textContent")
    assert page.inner_text("#key-trouble") == "The key is not accepted."
    page.fill("#key", "right-key")
    page.keyboard.press("Enter")
    page.wait_for_selector("#figures:visible")
    assert "fake" in page.inner_text("#served")
    assert page.title() == "fake – lightllmd"
    assert page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]") == [
        ["right-key"],
        0,
        "",
    ]
    assert "right-key" not in page.content()
    one.ask("with a key", **GREEDY)
    one.finished()
    page.reload()
    page.wait_for_selector("#figures:visible")
    other = one.open(locked.url + "/")
    other.wait_for_selector("#key-form:visible")
    page.click("#forget")
    page.wait_for_selector("#key-form:visible")
    assert page.evaluate("sessionStorage.length") == 0
    assert not page.locator("#figures").is_visible()


def test_without_a_key_nothing_is_asked_for_that_needs_one(tab: Callable[..., Tab], locked: Daemon) -> None:
    page = tab(locked.url + "/").page  # a 401 would be an error on the console
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    with page.expect_response("**/readiness"):
        pass
