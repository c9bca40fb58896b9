"""Headless Chromium at a daemon's page: what it loads, shows and complains of."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from harness import Daemon

try:
    from playwright.sync_api import Browser, Page, sync_playwright
except ImportError:
    Browser = Page = sync_playwright = None  # type: ignore[misc, assignment]

GREEDY = {"temperature": "0", "max_tokens": "200"}  # of `Tab.ask`

HOSTILE = (
    "<img src=x onerror='hacked=1'><script>hacked=1</script> [x](javascript:hacked=1) **<b>bold</b>** `<i>code</i>`\n\n"
    "```html\n<script>hacked=1</script>\n```\n\n<iframe srcdoc='<script>parent.hacked=1</script>'></iframe>\n"
)
# Told before anything of the page runs.
_WATCH = "window.refused = []; addEventListener('securitypolicyviolation', e => refused.push(e.violatedDirective));"


def executable() -> str:
    """The path of a Chromium; skips where there is none, or nothing to drive it with."""
    if sync_playwright is None:
        pytest.skip("playwright is not installed: pip install -e '.[page]'")
    named = os.environ.get("LIGHTLLMD_CHROMIUM")
    found = named or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("there is no Chromium: apt install chromium, or name one in LIGHTLLMD_CHROMIUM")
    return found


@contextmanager
def chromium() -> Iterator[Browser]:
    """Running."""
    path = executable()
    with sync_playwright() as playwright:
        # The tests may run as root, whom Chromium's sandbox refuses.
        browser = playwright.chromium.launch(executable_path=path, chromium_sandbox=os.getuid() != 0)
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """A fresh browser's tab with the page in it. `expected`: parts of console errors that the test provokes."""

    def __init__(self, browser: Browser, url: str, expected: tuple[str, ...] = (), **options: Any) -> None:
        self.context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
        self.context.set_default_timeout(20_000)
        self.context.add_init_script(_WATCH)
        self.expected = expected
        self.errors: list[str] = []
        self.page = self.open(url)

    def open(self, url: str) -> Page:
        """In a further tab of the same browser."""
        page = self.context.new_page()
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(url)
        return page

    def close(self, *, scripts: bool = True) -> None:
        """Raises AssertionError if a page complained of anything."""
        refused = [page.evaluate("window.refused") for page in self.context.pages] if scripts else []
        unexpected = [error for error in self.errors if not any(part in error for part in self.expected)]
        for page in self.context.pages:
            page.unroute_all(behavior="ignoreErrors")  # a request may be on its way
        self.context.close()
        assert unexpected == []
        assert not any(refused)

    # --- the chat
    def ask(self, question: str, **parameters: str) -> None:
        """Sends it; the answer is on its way then."""
        for field, value in parameters.items():
            self.page.evaluate(
                "([id, value]) => { document.getElementById(id).value = value }", [field.replace("_", "-"), value]
            )
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")

    def finished(self, count: int = 1) -> None:
        """Waits for the end of the last of `count` answers."""
        self.page.wait_for_function("count => document.querySelectorAll('.foot').length === count", arg=count)

    @property
    def answer(self) -> str:
        """The text of the newest."""
        return self.page.evaluate("[...document.querySelectorAll('.answer')].at(-1)?.textContent ?? ''")

    def growing(self, more_than: int = 0) -> str:
        """Waits until the newest answer has more characters than that."""
        self.page.wait_for_function(
            "least => ([...document.querySelectorAll('.answer')].at(-1)?.textContent ?? '').length > least",
            arg=more_than,
        )
        return self.answer

    def replies(self, body: str, status: int = 200, **headers: str) -> None:
        """Requests for an answer get this one from now on."""
        kind = "text/event-stream" if status == 200 else "application/json"
        told = {"Content-Type": kind} | {name.replace("_", "-"): value for name, value in headers.items()}
        self.page.unroute("**/v1/chat/completions")
        self.page.route("**/v1/chat/completions", lambda route: route.fulfill(status=status, headers=told, body=body))


# --- what an answer should be
def whole(daemon: Daemon, question: str, **parameters: Any) -> str:
    """The same answer, asked for without the page."""
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 200} | parameters
    answer = httpx.post(f"{daemon.url}/v1/chat/completions", json=body, timeout=60)
    return answer.json()["choices"][0]["message"]["content"]


def drawn(tab: Tab, text: str) -> str:
    """What the page makes of `text`, as text."""
    return tab.page.evaluate(
        """async text => {
            const from = document.querySelector('script[type=module]').src;
            const { Answer } = await import(new URL('answer.js', from));
            const into = document.createElement('div');
            const answer = new Answer(into);
            answer.add(text);
            answer.end();
            return into.textContent;
        }""",
        text,
    )


def stream(*deltas: dict[str, Any], finish: str = "stop", end: str = "data: [DONE]\n\n") -> str:
    """The events of an answer."""
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end
