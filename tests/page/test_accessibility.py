"""For keyboards, screen readers, narrow windows, both colour schemes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from harness import Daemon
from page.browser import HOSTILE, Tab, stream

STATES: dict[str, Callable[[Tab], None]] = {
    "empty": lambda one: None,
    "answered": lambda one: (
        one.replies(stream({"reasoning_content": "hm"}, {"content": HOSTILE})),
        one.ask("x"),
        one.finished(),
    ),
    "parameters": lambda one: one.page.click("#parameters summary"),
    "refused": lambda one: (one.replies(stream(end="")), one.ask("x"), one.page.wait_for_selector("#trouble:visible")),
    "figures": lambda one: one.page.evaluate("document.getElementById('status').open = true"),
}


@pytest.mark.parametrize(
    ("scheme", "width", "state"), list(itertools.product(("light", "dark"), (320, 400, 1280), STATES))
)
def test_axe_finds_nothing(tab: Callable[..., Tab], scheme: str, width: int, state: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install -e '.[page]'").Axe()
    one = tab(color_scheme=scheme, viewport={"width": width, "height": 800})
    STATES[state](one)
    found = axe.run(
        one.page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
    )
    assert found.response["violations"] == [], found.generate_report()
    assert one.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_axe_finds_nothing_where_a_key_is_asked_for(tab: Callable[..., Tab], locked: Daemon) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install -e '.[page]'").Axe()
    found = axe.run(tab(locked.url + "/", color_scheme="dark").page)
    assert found.response["violations"] == [], found.generate_report()


def test_the_keyboard_reaches_everything_in_order_and_can_be_seen(tab: Callable[..., Tab]) -> None:
    page = tab().page
    seen = []
    for _ in range(6):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                "() => { const at = document.activeElement; return at.id || at.className || at.textContent.trim(); }"
            )
        )
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", seen[-1]
    assert seen[:5] == ["skip", "question", "new", "send", "Parameters"]
    assert seen[5].startswith("Status")


def test_the_skip_link_goes_to_the_chat(tab: Callable[..., Tab]) -> None:
    page = tab().page
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('.skip').getBoundingClientRect().top") >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "chat"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "question"


def test_shift_and_enter_begins_a_line_and_an_input_method_s_enter_sends_nothing(tab: Callable[..., Tab]) -> None:
    one = tab()
    page = one.page
    page.focus("#question")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#question") == "one\ntwo"
    for way in ({"isComposing": True}, {"keyCode": 229}):
        page.evaluate(
            "way => document.getElementById('question').dispatchEvent("
            "new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, cancelable: true, ...way}))",
            way,
        )
    assert page.locator("#log > li").count() == 0
    assert page.input_value("#question") == "one\ntwo"


def test_screen_readers_hear_sentences(tab: Callable[..., Tab]) -> None:
    said = tab().page.evaluate(
        """async () => {
            const from = document.querySelector('script[type=module]').src;
            const { Speaker } = await import(new URL('speaker.js', from));
            const region = document.createElement('div');
            const said = [];
            let now = 0;
            performance.now = () => now;
            const append = region.append.bind(region);
            region.append = node => { said.push(node.textContent); append(node); };
            const speaker = new Speaker(region);
            for (const token of 'One sentence. And `another` one! The last has no end'.match(/.{1,3}/g)) {
                speaker.add(token);
                now += 400;
            }
            speaker.end('Done.');
            return said;
        }"""
    )
    assert said == ["One sentence.", "And another one!", "The last has no end Done."]
    page = tab().page
    assert page.get_attribute("#spoken", "aria-live") == "polite"
    assert page.locator("#log[aria-live]").count() == 0  # else each token would be read


def test_schemes_and_motion_follow_the_system(tab: Callable[..., Tab]) -> None:
    grounds = set()
    for scheme in ("light", "dark"):
        one = tab(color_scheme=scheme, reduced_motion="reduce")
        grounds.add(one.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        one.ask("x", temperature="0", max_tokens="2000")
        assert (
            one.page.evaluate("getComputedStyle(document.querySelector('.waiting'), '::before').animationName")
            == "none"
        )
        one.page.keyboard.press("Escape")
    assert len(grounds) == 2
