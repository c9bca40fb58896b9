"""One browser and one daemon with the fake engine for all of these tests, and one more that asks for keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from harness import Daemon
from page.browser import Browser, Tab, chromium

PACE = 60  # tokens per second


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def daemon(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    flags = ("--engine.fake.tokens_per_second", str(PACE), "--http.hold_keepalive", "0.3")
    with Daemon(tmp_path_factory.mktemp("page"), *flags) as daemon:
        yield daemon


@pytest.fixture
def tab(browser: Browser, daemon: Daemon) -> Iterator[Callable[..., Tab]]:
    """Opens tabs; looks afterwards whether anything was complained of."""
    tabs: list[Tab] = []

    def opened(url: str = "", expected: tuple[str, ...] = (), **options: Any) -> Tab:
        tabs.append(Tab(browser, url or daemon.url + "/", expected, **options))
        return tabs[-1]

    yield opened
    for one in tabs:
        one.close()


@pytest.fixture(scope="session")
def locked(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("locked")
    (folder / "keys").write_text("right-key\n")
    with Daemon(folder, "--http.api_keys_file", str(folder / "keys")) as daemon:
        yield daemon
