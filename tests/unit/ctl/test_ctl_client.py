"""The client class that tests and tools use."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lightllmctl.client import Client
from lightllmd import errors


@pytest.fixture
def client(daemon: Any) -> Any:
    with Client(daemon.path) as client:
        yield client


def test_get_and_post(client: Client, daemon: Any) -> None:
    daemon.get("/v1/config", {"a": 1})
    daemon.post("/v1/check", {"ok": True})
    assert client.get("/v1/config", effective=1, nothing=None) == {"a": 1}
    assert client.post("/v1/check", {"file": "x"}) == {"ok": True}
    assert daemon.seen == [
        ("GET", "/v1/config", {"effective": "1"}, None),
        ("POST", "/v1/check", {}, {"file": "x"}),
    ]
    assert "if-match" not in daemon.headers[1]


def test_a_mutation_can_be_bound_to_a_generation(client: Client, daemon: Any) -> None:
    daemon.post("/v1/restart", {"id": 1})
    client.post("/v1/restart", if_match=7)
    assert daemon.headers[0]["if-match"] == "7"


def test_lists_are_asked_for_by_name(client: Client, daemon: Any) -> None:
    assert [worker["name"] for worker in client.get_list("/v1/workers")] == ["api-0", "engine-0", "engine-1"]
    with pytest.raises(errors.BadAnswer):
        client.get("/v1/workers")
    with pytest.raises(errors.BadAnswer):
        client.get_list("/v1/status")


def test_an_error_keeps_its_name_and_parameters(client: Client, daemon: Any, answer: Any) -> None:
    body = {"error": "NoSuchWorker", "message": "no worker x", "candidates": ["api-0"]}
    daemon.post("/v1/restart", answer(body, 404))
    with pytest.raises(errors.NoSuchWorker, match="no worker x") as caught:
        client.post("/v1/restart")
    assert caught.value.parameters == {"candidates": ["api-0"]}


def test_config_problems_come_back_as_problems(client: Client, daemon: Any, answer: Any) -> None:
    sent = errors.ConfigInvalid([errors.Problem("port", "is wrong", "a.toml", 3), errors.Problem("tp", "too")])
    daemon.post("/v1/check", answer({**sent.as_dict(), "later": 1}, 400))
    with pytest.raises(errors.ConfigInvalid) as caught:
        client.post("/v1/check")
    assert caught.value.problems == sent.problems
    for problems in (None, 3, [], [3]):
        daemon.post("/v1/check", answer({"error": "ConfigInvalid", "message": "m", "problems": problems}, 400))
        with pytest.raises(errors.ConfigInvalid, match="m"):
            client.post("/v1/check")


def test_the_name_of_an_error_cannot_reach_outside_the_table(client: Client, daemon: Any, answer: Any) -> None:
    for name in ("Any", "dataclass", "EXIT_OK", "__name__", ""):
        daemon.post("/v1/restart", answer({"error": name, "message": "m"}, 400))
        with pytest.raises(errors.ControlError, match="m"):
            client.post("/v1/restart")


def test_streams_skip_keep_alives_and_end_with_the_daemons_end(client: Client, daemon: Any, answer: Any) -> None:
    daemon.get("/v1/events", answer(lines=["", {"seq": 1}, "", "", {"seq": 2}]))
    assert list(client.stream("/v1/events")) == [{"seq": 1}, {"seq": 2}]


def test_a_stream_that_breaks_off_is_told_from_one_that_ends(client: Client, daemon: Any, answer: Any) -> None:
    daemon.get("/v1/events", answer(lines=[{"seq": 1}], cut=True))
    seen: list[Any] = []
    with pytest.raises(errors.ConnectionLost):
        seen.extend(client.stream("/v1/events"))
    stream = client.stream("/v1/events")
    assert next(stream) == {"seq": 1}


def test_a_stream_refused_is_an_error(client: Client, answer: Any) -> None:
    with pytest.raises(errors.NoSuchJob):
        list(client.stream("/v1/jobs/99"))


def test_waiting_ends_in_time_however_lively_the_stream_is(client: Client, daemon: Any, answer: Any) -> None:
    over = threading.Event()

    def beat() -> str:
        over.wait(0.02)
        return ""

    daemon.get("/v1/events", answer(lines=[{"seq": 1}, *[beat] * 1000]))
    with pytest.raises(errors.NoAnswer):
        list(client.stream("/v1/events", wait=0.3))
    over.set()
    daemon.get("/v1/events", answer(lines=[{"seq": 1}]))
    assert list(client.stream("/v1/events", wait=30)) == [{"seq": 1}]


def test_a_stream_that_is_left_early_leaves_nothing_behind(client: Client, daemon: Any, answer: Any) -> None:
    daemon.get("/v1/events", answer(lines=[{"seq": n} for n in range(1000)]))
    for event in client.stream("/v1/events", wait=30):
        assert event == {"seq": 0}
        break
    assert client.get("/v1/status")["api"] == 1
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_a_client_outlives_its_daemon(client: Client, daemon: Any) -> None:
    client.get("/v1/status")
    daemon.end()
    for _ in range(2):
        with pytest.raises((errors.DaemonNotRunning, errors.ConnectionLost)):
            client.get("/v1/version")


def test_wait_gone(client: Client, daemon: Any) -> None:
    assert not client.wait_gone(None, 0.1)
    threading.Timer(0.1, daemon.end).start()
    assert client.wait_gone(None, 20)
    assert client.wait_gone(2**22 - 1, 20)
