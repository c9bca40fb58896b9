"""What the page shows of the daemon, with scripts and without, and what it asks for meanwhile."""

from __future__ import annotations

from collections.abc import Callable

from harness import Daemon
from page.browser import GREEDY, Browser, Tab, drawn, whole


def test_the_page_loads_and_shows_the_state(tab: Callable[..., Tab], daemon: Daemon) -> None:
    page = tab().page
    assert page.title() == "fake – lightllmd"
    assert page.inner_text("#health-word") == "Ready"
    page.wait_for_function("() => document.getElementById('workers').childElementCount >= 2")
    for told in ("Serving fake", "api-0", "engine-0", "3,072 tokens"):
        assert told in page.locator("aside").inner_text()
    asked = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert asked
    assert all(name.startswith(daemon.url) for name in asked)


def test_figures_follow_the_engine(tab: Callable[..., Tab]) -> None:
    one = tab()
    one.ask("figures", temperature="0", max_tokens="400")
    one.page.wait_for_function("() => document.querySelector('[data-text=running]').textContent === '1'")
    one.page.wait_for_function("() => parseFloat(document.querySelector('[data-text=rate]').textContent) > 10")
    assert float(one.page.get_attribute("#used", "width")) > 0
    assert len(one.page.get_attribute("#spark polyline", "points").split()) > 1
    one.page.press("#question", "Escape")


def test_without_javascript_the_figures_are_there_and_the_chat_says_what_it_needs(
    browser: Browser, daemon: Daemon
) -> None:
    one = Tab(browser, daemon.url + "/", java_script_enabled=False)
    page = one.page
    text = page.locator("body").inner_text()
    for told in ("Ready", "Serving fake", "api-0", "engine-0", "3,072 tokens", "The chat needs JavaScript."):
        assert told in text
    assert not page.locator("#conversation").is_visible()
    assert page.locator("meta[http-equiv=refresh]").get_attribute("content") == "5"
    one.close(scripts=False)


def test_a_hidden_tab_asks_for_nothing(tab: Callable[..., Tab]) -> None:
    page = tab().page
    page.clock.install()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    show = "hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true}); "
    show += "document.dispatchEvent(new Event('visibilitychange')); }"
    page.evaluate(show, True)
    page.wait_for_load_state("networkidle")
    asked.clear()
    page.clock.run_for(120_000)
    assert asked == []
    with page.expect_response("**/page/state"):
        page.evaluate(show, False)


def test_a_model_without_a_chat_has_what_suits_it(tab: Callable[..., Tab]) -> None:
    one = tab()
    page = one.page
    kinds = iter(["scores", "vectors", "text"])
    state = page.evaluate("fetch('page/state').then(response => response.json())")
    page.route("**/page/state", lambda route: route.fulfill(json=state | {"kind": next(kinds)}))
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_selector("[data-for=scores]:visible")
    assert "scores texts" in page.inner_text("[data-for=scores]")
    assert not page.locator("#conversation").is_visible()
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_selector("[data-for=vectors]:visible")
    assert not page.locator("[data-for=scores]").is_visible()
    assert not page.locator("#conversation").is_visible()
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_selector("#conversation:visible")
    page.unroute("**/page/state")
    page.route("**/page/state", lambda route: route.fulfill(json=state | {"kind": "text"}))
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    one.ask("once upon", **GREEDY)
    one.finished()
    assert sent[0].endswith("/v1/completions")
    assert one.answer


def test_it_works_below_a_path_of_a_proxy(tab: Callable[..., Tab], daemon: Daemon) -> None:
    """Its addresses are relative."""
    one = tab("about:blank")
    one.page.route(
        "http://proxy.test/llm/**",
        lambda route: route.fulfill(
            response=route.fetch(url=route.request.url.replace("http://proxy.test/llm", daemon.url))
        ),
    )
    one.page.goto("http://proxy.test/llm/")
    one.ask("through a proxy", **GREEDY)
    one.finished()
    assert one.answer == drawn(one, whole(daemon, "through a proxy"))
