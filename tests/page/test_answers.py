"""Whatever an answer holds is text; what it is drawn like does not depend on how it came."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from page.browser import HOSTILE, Tab, stream


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_no_answer_becomes_html(tab: Callable[..., Tab], size: int) -> None:
    one = tab()
    parts = [HOSTILE[at : at + size] for at in range(0, len(HOSTILE), size)]
    one.replies(stream(*({"content": part} for part in parts)))
    one.ask(HOSTILE)
    one.finished()
    assert one.page.evaluate("window.hacked") is None
    assert one.page.locator("#log :is(script, img, iframe, a, b, i)").count() == 0
    assert one.page.locator(".answer pre code").inner_text() == "<script>hacked=1</script>\n"
    assert one.page.locator(".answer strong").inner_text() == "<b>bold</b>"
    assert one.page.locator(".answer p > span > code").inner_text() == "<i>code</i>"
    assert one.page.locator(".asked .said").text_content() == HOSTILE


TEXTS = (
    "plain",
    "two\n\nparagraphs\nof lines\n",
    "```python\nprint(1)\n\n\nprint(2)\n```\nafter",
    "~~~\n```\n~~~\n`````\n```\n`````\n",
    "an open block\n```\nwithout end",
    "# heading\ntext **bold** and `code` ** not\n1. list\n- other\n   ```js\n   x\n   ```\n",
    "`" * 7 + "\n" + "*" * 9 + "\r\n\r\n\u202e\u0000😀" + "x" * 4000,
)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_an_answer_is_drawn_alike_however_it_is_cut(tab: Callable[..., Tab], text: str) -> None:
    drawn = tab().page.evaluate(
        """async text => {
            const from = document.querySelector('script[type=module]').src;
            const { Answer } = await import(new URL('answer.js', from));
            return [1, 2, 7, 1e9].map(size => {
                const into = document.createElement('div');
                const answer = new Answer(into);
                for (let at = 0; at < text.length; at += size) {
                    answer.add(text.slice(at, at + size));
                    if (size !== 2) answer.draw();
                }
                answer.end();
                const shape = node =>
                    node.nodeType === 3 ? node.data : [node.tagName, ...[...node.childNodes].map(shape)];
                into.normalize();
                return [JSON.stringify(shape(into)), answer.text];
            });
        }""",
        text,
    )
    assert len({json.dumps(one) for one in drawn}) == 1
    assert drawn[0][1] == text


def test_a_long_answer_does_not_get_slower(tab: Callable[..., Tab]) -> None:
    steps = tab().page.evaluate(
        """async () => {
            const from = document.querySelector('script[type=module]').src;
            const { Answer } = await import(new URL('answer.js', from));
            const answer = new Answer(document.createElement('div'));
            const took = [];
            for (let part = 0; part < 6; part++) {
                const begun = performance.now();
                for (let step = 0; step < 4000; step++) {
                    answer.add('token ');
                    answer.draw();
                }
                took.push(performance.now() - begun);
            }
            return took;
        }"""
    )
    assert min(steps[3:]) < 4 * max(steps[1], 50)


def test_thoughts_are_folded_and_not_sent_back(tab: Callable[..., Tab]) -> None:
    one = tab()
    one.replies(stream({"reasoning_content": "let me "}, {"reasoning_content": "see"}, {"content": "42"}))
    sent: list[dict[str, Any]] = []
    one.page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    one.ask("think")
    one.finished()
    thoughts = one.page.locator("details.thinking")
    assert thoughts.get_attribute("open") is None
    assert "Thought for" in thoughts.locator("summary").inner_text()
    thoughts.locator("summary").click()
    assert thoughts.locator("div").inner_text() == "let me see"
    assert one.answer == "42"
    one.ask("again")
    one.finished(2)
    assert sent[1]["messages"][1] == {"role": "assistant", "content": "42"}


def test_answers_can_be_copied(tab: Callable[..., Tab]) -> None:
    one = tab(permissions=["clipboard-read", "clipboard-write"])
    one.replies(stream({"content": HOSTILE}))
    one.ask("x")
    one.finished()
    one.page.click("text=Copy answer")
    one.page.wait_for_selector("text=Copied")
    assert one.page.evaluate("navigator.clipboard.readText()") == HOSTILE
    one.page.click("text=Copy code")
    one.page.wait_for_function(
        "() => navigator.clipboard.readText().then(text => text === '<script>hacked=1</script>\\n')"
    )
