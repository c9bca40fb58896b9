"""Pushes to a gateway that takes them, and to one that does not."""

from __future__ import annotations

import base64
import logging
import queue
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from gateway_stand_in import TIMEOUT, Gateway
from harness import free_port
from lightllmd.ipc import messages
from lightllmd.observe.metrics import render
from push_scene import GROUP, PushScene, count_something

WARNED = "can't be pushed to"
RECOVERED = "are pushed to"


@pytest.fixture(autouse=True)
def _no_proxy_and_every_word(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    caplog.set_level(logging.DEBUG, "lightllmd.push")


def said(caplog: pytest.LogCaptureFixture, level: int, part: str = "") -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level and part in record.getMessage()]


# --- what is pushed, and where to ------------------------------------------------------------------------------------


def test_each_push_replaces_the_group_with_all_that_metrics_shows(tmp_path: Path) -> None:
    count_something(tmp_path, 1)
    with Gateway() as gateway, PushScene(tmp_path, gateway.address, interval=3600) as scene:
        pushed = gateway.next()
        assert (pushed.method, pushed.group) == ("PUT", {"job": "lightllm", **GROUP})
        assert pushed.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert pushed.body == render(str(tmp_path))
        assert b"lightllm_test_total 1.0" in pushed.body
        count_something(tmp_path, 2)
        scene.change()
        assert gateway.next().body == render(str(tmp_path))


@pytest.mark.parametrize(
    ("job", "labels"),
    [
        ("lightllm", {}),
        ("a/b", {"path": "/srv/models/", "slash": "/"}),
        ("two words", {"text": "a b  c"}),
        ("größe", {"empty": "", "text": "ä\n\t\"'\\"}),
        ("100%", {"query": "x=1&y=2?#;:@+", "dots": "...", "tilde": "~"}),
        ("a+b", {"z": "1", "a": "2", "job2": "/+ %"}),
    ],
)
def test_any_text_arrives_as_the_value_of_a_label(job: str, labels: dict[str, str], tmp_path: Path) -> None:
    with Gateway() as gateway, PushScene(tmp_path, gateway.address, job=job, grouping_key=labels):
        assert gateway.next().group == {"job": job, **labels}


def test_a_gateway_may_have_an_ipv6_address(tmp_path: Path) -> None:
    try:
        gateway = Gateway("::1")
    except OSError as refused:
        pytest.skip(f"no IPv6 here: {refused}")
    with gateway, PushScene(tmp_path, gateway.address):
        assert gateway.next().headers["Host"] == gateway.address


@pytest.mark.parametrize("zone", ["10", "eb0", "eth0"])
def test_the_zone_of_an_address_stays_as_it_is(zone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: queue.Queue[tuple[str, int]] = queue.Queue()

    def resolve(host: str, port: int, *_: Any) -> Any:
        asked.put((host, port))
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with PushScene(tmp_path, f"[fe80::1%{zone}]:9091"):
        assert asked.get(timeout=TIMEOUT) == (f"fe80::1%{zone}", 9091)


def test_user_and_password_are_told_where_they_are_set(tmp_path: Path) -> None:
    with Gateway() as gateway, PushScene(tmp_path, gateway.address, interval=3600) as scene:
        assert "Authorization" not in gateway.next().headers
        scene.change(user="ü", password="a:b")
        told = gateway.next().headers["Authorization"]
        assert told == f"Basic {base64.b64encode('ü:a:b'.encode()).decode()}"


# --- outages ---------------------------------------------------------------------------------------------------------

OUTAGES: dict[int | str, str] = {
    400: '400 Bad Request: "pushed metrics are invalid"',
    401: "401 Unauthorized",
    503: "503 Service Unavailable",
    302: "302 Found",
    "garbage": 'the answer is no HTTP: "SSH-2.0-OpenSSH_9.2',
    "close": "Remote end closed connection without response",
    "silent": "no answer within 0.5 s",
    "trickle": "it took longer than 1 s",
    "endless": "400 Bad Request",
}
SLOW = ("silent", "trickle")


@pytest.mark.parametrize("behaviour", OUTAGES)
def test_an_outage_is_told_once_and_counted_and_so_is_its_end(
    behaviour: int | str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Gateway() as gateway:
        gateway.behaviour = behaviour
        with PushScene(tmp_path, gateway.address, push_timeout=1.0 if behaviour in SLOW else 30.0) as scene:
            stats = scene.beat(lambda stats: stats["push_failures"] >= 3)
            assert stats["failing"] == 1.0
            assert "pushed_at" not in stats
            gateway.behaviour = 200
            gateway.released.set()
            stats = scene.beat(lambda stats: "pushed_at" in stats and not stats["failing"])
            failures = stats["push_failures"]
            assert stats["pushes"] > failures
            assert scene.beat(lambda now: now["pushes"] > stats["pushes"] + 2)["push_failures"] == failures
    [warning] = said(caplog, logging.WARNING)
    assert OUTAGES[behaviour] in warning
    assert f'{gateway.address} {{job="lightllm", instance="node7"}}' in warning
    [recovery] = said(caplog, logging.INFO, "again")
    assert f"after {failures:.0f} failures" in recovery


def test_a_gateway_that_is_down_is_found_when_it_is_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    with PushScene(tmp_path, f"127.0.0.1:{port}") as scene:
        scene.beat(lambda stats: stats["push_failures"] >= 3)
        with Gateway(port=port) as gateway:
            gateway.next()
            scene.beat(lambda stats: not stats["failing"])
            scene.stop()
    assert [("Connection refused" in warning) for warning in said(caplog, logging.WARNING)] == [True]


def test_a_second_outage_is_told_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Gateway() as gateway, PushScene(tmp_path, gateway.address) as scene:
        for outage in (1, 2):
            gateway.behaviour = 503
            scene.beat(lambda stats: stats["failing"])
            gateway.behaviour = 200
            scene.beat(lambda stats: not stats["failing"])
            assert len(said(caplog, logging.WARNING)) == outage


class SlowNames:
    """Name look-ups that hang until they are released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        self.released = threading.Event()
        self._real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.asked.append(arguments)
        self.released.wait(TIMEOUT)
        return self._real(*arguments, **options)


def test_a_name_look_up_that_hangs_keeps_one_thread_and_no_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = SlowNames(monkeypatch)
    with Gateway() as gateway:
        with PushScene(tmp_path, f"localhost:{gateway.port}", push_timeout=0.5) as scene:
            scene.beat(lambda stats: stats["push_failures"] >= 4)
            assert len(names.asked) == 1
            assert gateway.pushes.empty()
            names.released.set()
            scene.beat(lambda stats: "pushed_at" in stats)
        assert len(said(caplog, logging.WARNING)) == 1
        assert "the push before still looks up" in " ".join(said(caplog, logging.DEBUG))


def test_a_push_that_is_late_is_not_sent_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = SlowNames(monkeypatch)
    with Gateway() as gateway:
        with PushScene(tmp_path, f"localhost:{gateway.port}", push_timeout=0.1, interval=3600) as scene:
            scene.beat(lambda stats: stats["push_failures"] == 1)
            names.released.set()
            scene.stop()
        assert gateway.pushes.qsize() == 1, "the last push alone"


# --- a target that changes -------------------------------------------------------------------------------------------


def test_a_changed_target_is_pushed_to_at_once_and_the_old_group_is_left_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Gateway() as old, Gateway() as new, PushScene(tmp_path, old.address, interval=3600) as scene:
        old.next()
        scene.change(grouping_key={"instance": "node8"})
        assert old.next().group == {"job": "lightllm", "instance": "node8"}
        scene.change(job="another")
        assert old.next().group["job"] == "another"
        scene.change(gateway=new.address)
        assert new.next().method == "PUT"
        scene.stop()
        assert old.pushes.empty()
    told = said(caplog, logging.INFO, "from now on")
    assert len(told) == 3
    assert f'at {old.address} {{job="lightllm", instance="node7"}} they stay as they were pushed last' in told[0]


def test_a_push_under_way_is_broken_off_for_a_changed_target(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Gateway() as silent, Gateway() as new:
        silent.behaviour = "silent"
        with PushScene(tmp_path, silent.address, interval=3600) as scene:
            silent.next()
            scene.change(gateway=new.address)
            new.next()
            assert scene.beat(lambda stats: "pushed_at" in stats)["push_failures"] == 0
    assert said(caplog, logging.WARNING) == []


def test_a_changed_interval_counts_at_once(tmp_path: Path) -> None:
    with Gateway() as gateway, PushScene(tmp_path, gateway.address, interval=3600) as scene:
        gateway.next()
        scene.change(interval=0.01)
        for _ in range(5):
            gateway.next()


# --- the end ---------------------------------------------------------------------------------------------------------


def test_the_last_push_tells_the_final_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    count_something(tmp_path, 1)
    with Gateway() as gateway, PushScene(tmp_path, gateway.address, interval=3600) as scene:
        gateway.next()
        count_something(tmp_path, 7)
        scene.stop()
        assert b"lightllm_test_total 7.0" in gateway.next().body
    assert len(said(caplog, logging.INFO, "a last time")) == 1


@pytest.mark.parametrize("behaviour", [503, "silent", "trickle", "down", "no name"])
def test_a_gateway_that_takes_no_last_push_does_not_hold_up_the_end(
    behaviour: int | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(messages, "LAST_PUSH", 0.3)
    if behaviour == "no name":
        names = SlowNames(monkeypatch)
    with Gateway() as gateway:
        gateway.behaviour = behaviour
        address = f"localhost:{gateway.port}" if behaviour == "no name" else gateway.address
        scene = PushScene(tmp_path, f"127.0.0.1:{free_port()}" if behaviour == "down" else address, 60, interval=3600)
        with scene:
            scene.beat()
            seconds = scene.stop()
        if behaviour == "no name":
            names.released.set()
    assert seconds < 25, "0.5 s, where a push may take 60; the rest is the machine's"
    assert "the last push" in said(caplog, logging.WARNING)[-1]
