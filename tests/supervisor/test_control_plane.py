"""The control plane over its socket: reads, mutations, streams, refusals and bounds."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from harness import wait_for
from lightllmd.supervisor import snapshot
from lightllmd.supervisor.control.peers import MOST_CONNECTIONS, Peer, may_mutate
from stand_ins import StandInDaemon


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandInDaemon]:
    daemon = StandInDaemon(tmp_path_factory.mktemp("control"))
    with daemon:
        yield daemon


@pytest.fixture
def client(daemon: StandInDaemon) -> Iterator[httpx.Client]:
    with daemon.control_client() as client:
        yield client


# --- reads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/v1/status", snapshot.Status),
        ("/v1/version", snapshot.Version),
        ("/v1/workers", list[snapshot.WorkerStatus]),
        ("/v1/config?effective=1", snapshot.Effective),
        ("/v1/jobs", list[snapshot.JobStatus]),
    ],
)
def test_answers_have_the_declared_shape(client: httpx.Client, path: str, shape: type) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    msgspec.json.decode(answer.content, type=shape)


def test_configuration_is_shown_as_written_and_as_in_force(client: httpx.Client, daemon: StandInDaemon) -> None:
    assert client.get("/v1/config").json()["params"]["max_total_token_num"] == "auto"
    effective = client.get("/v1/config?effective=true").json()
    assert isinstance(effective["values"]["max_total_token_num"], int)
    assert any(derived["reason"] for derived in effective["derived"])
    assert "memory:" in effective["report"]


def test_check_names_file_line_and_key(client: httpx.Client, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text('model_dir = "/models/x"\n')
    bad.write_text('model_dir = "/models/x"\nprot = 8000\n')
    assert client.post("/v1/check", json={"file": str(good)}).json() == {"file": str(good), "ok": True}
    refusal = client.post("/v1/check", json={"file": str(bad)})
    assert refusal.status_code == 400
    assert refusal.json()["error"] == "ConfigInvalid"
    assert refusal.json()["problems"][0]["line"] == 2


def test_events_and_logs_are_streams_of_lines(client: httpx.Client) -> None:
    events = [json.loads(line) for line in client.get("/v1/events").text.splitlines() if line]
    assert [event["seq"] for event in events] == sorted(event["seq"] for event in events)
    assert "ready" in {event["kind"] for event in events}
    lines = [json.loads(line) for line in client.get("/v1/logs?worker=engine-0").text.splitlines() if line]
    assert {(line["worker"], line["level"]) for line in lines} == {("engine-0", "info"), ("engine-0", "warning")}
    assert len(client.get("/v1/logs?lines=1").text.split()) >= 1
    assert "engine-0: engine 1 begins" in client.get("/v1/logs?format=text&lines=1000").text


def test_logs_and_events_are_followed(daemon: StandInDaemon) -> None:
    transport = httpx.HTTPTransport(uds=str(daemon.control))
    seen: list[str] = []
    found = threading.Event()

    def follow() -> None:
        with (
            httpx.Client(transport=transport, base_url="http://control", timeout=30) as client,
            client.stream("GET", "/v1/logs?follow=1&lines=0") as stream,
        ):
            assert stream.headers["content-type"] == "application/x-ndjson"
            found.set()
            for line in stream.iter_lines():
                seen.append(line)
                if "SIGHUP" in line:
                    return

    follower = threading.Thread(target=follow)
    follower.start()
    assert found.wait(30)
    daemon.process.send_signal(signal.SIGHUP)
    follower.join(30)
    assert not follower.is_alive()
    assert not any("begins" in line for line in seen), "lines=0 shows no history"


# --- mutations -------------------------------------------------------------------------------------------------------


def test_api_worker_is_replaced_before_it_retires(daemon: StandInDaemon) -> None:
    epoch = daemon.worker("api-0")["generation"]
    daemon.order("api", load_seconds=0.5)  # the stand-in's time to readiness
    job = daemon.wait_job(daemon.ask("restart", {"worker": "api"}))
    daemon.order("api")
    assert (job["outcome"], job["phase"], job["by_uid"]) == ("done", "done", os.getuid())
    retired = daemon.wait_heard(f"api-{epoch}", "Retire")["at"]
    replacement = daemon.worker("api-0")
    assert replacement["generation"] == epoch + 1
    assert retired >= replacement["started"] + 0.5, "the old one served until the new one was ready"
    assert daemon.wait_heard(f"api-{epoch + 1}", "EngineUp")
    assert daemon.wait_heard(f"engine-{daemon.status()['generation']}", "ApiGone")["epoch"] == epoch


def test_a_failed_replacement_leaves_the_old_api_worker_in_service(daemon: StandInDaemon) -> None:
    before = daemon.worker("api-0")
    daemon.order("api", exit=1)
    job = daemon.wait_job(daemon.ask("restart", {"worker": "api-0"}))
    daemon.order("api")
    assert job["outcome"] == "failed"
    assert "the old one goes on" in job["message"]
    after = daemon.worker("api-0")
    assert (after["pid"], after["state"]) == (before["pid"], "running")
    assert daemon.wait_job(daemon.ask("restart", {"worker": "api-0"}))["outcome"] == "done"


def test_requested_engine_restart_blames_no_request(daemon: StandInDaemon) -> None:
    api = daemon.worker("api-0")["generation"]
    generation = daemon.status()["generation"]
    daemon.order("engine", unproven=[1, 2])
    for turn in (1, 2):
        job = daemon.wait_job(daemon.ask("restart", {"worker": "engine"}))
        assert job["outcome"] == "done"
        assert daemon.status()["generation"] == generation + turn
    downs = daemon.heard(f"api-{api}", "EngineDown")[-2:]
    assert [(down["cause"], down["unproven"]) for down in downs] == [("restart requested", [])] * 2
    daemon.order("engine")


def test_drain_and_resume(daemon: StandInDaemon) -> None:
    api = daemon.worker("api-0")["generation"]
    daemon.order("live", api={"in_flight": 3})
    wait_for(lambda: daemon.status()["requests"]["in_flight"] == 3)
    draining = daemon.ask("drain")
    assert daemon.status()["state"] == "draining"
    busy = daemon.ask("restart")
    assert (busy.status_code, busy.json()["error"], busy.json()["job"]) == (409, "Busy", draining.json()["id"])
    daemon.order("live")
    assert daemon.wait_job(draining)["outcome"] == "done"
    status = daemon.status()
    assert (status["state"], status["ready"]) == ("drained", False)
    assert daemon.wait_job(daemon.ask("resume"))["outcome"] == "done"
    assert [message["message"] for message in daemon.heard(f"api-{api}") if message["message"] != "Health"][-2:] == [
        "Drain",
        "Resume",
    ]
    wait_for(lambda: daemon.status()["ready"])


def test_resume_cancels_a_drain(daemon: StandInDaemon) -> None:
    daemon.order("live", api={"in_flight": 3})
    wait_for(lambda: daemon.status()["requests"]["in_flight"] == 3)
    draining = daemon.ask("drain")
    assert daemon.wait_job(daemon.ask("resume"))["outcome"] == "done"
    assert daemon.wait_job(draining)["outcome"] == "cancelled"
    daemon.order("live")


def test_if_match_guards_against_a_lost_update(daemon: StandInDaemon) -> None:
    generation = daemon.status()["generation"]
    stale = daemon.ask("restart", premise=str(generation + 1))
    assert (stale.status_code, stale.json()["error"], stale.json()["generation"]) == (
        412,
        "StaleGeneration",
        generation,
    )
    assert daemon.wait_job(daemon.ask("restart", {"worker": "engine"}, premise=f'"{generation}"'))["outcome"] == "done"


def test_a_premise_of_any_length_is_a_number_or_refused(daemon: StandInDaemon) -> None:
    for premise in ("9" * 5000, '"' + "9" * 5000 + '"', "-1", "1e3", "*", "\u0661"):
        assert daemon.ask("restart", premise=premise.encode()).json()["error"] == "Usage"
    assert daemon.ask("restart", premise="9" * 15).json()["error"] == "StaleGeneration"


def test_a_check_of_a_pipe_is_refused_and_holds_up_no_other(
    client: httpx.Client, daemon: StandInDaemon, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    for _ in range(10):  # more than there are threads
        answer = client.post("/v1/check", json={"file": str(tmp_path / "pipe.toml")})
        assert "it is a pipe" in answer.json()["message"]
    assert daemon.status()["ready"]


# --- refusals and bounds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "error"),
    [
        ("POST", "/v1/restart", b'{"worker":"engine-7"}', 404, "NoSuchWorker"),
        ("POST", "/v1/restart", b'{"worker":7}', 400, "Usage"),
        ("POST", "/v1/restart", b'{"wroker":"api"}', 400, "Usage"),
        ("POST", "/v1/restart", b"[]", 400, "Usage"),
        ("POST", "/v1/restart", b"{" * 100_000, 400, "Usage"),
        ("POST", "/v1/restart", b'{"worker":"\xff"}', 400, "Usage"),
        ("POST", "/v1/check", b'{"file":"' + b"x" * (1 << 20) + b'"}', 413, "BodyTooLarge"),
        ("POST", "/v1/check", b'{"file":"relative.toml"}', 400, "Usage"),
        ("POST", "/v1/stop", b'{"now":"yes"}', 400, "Usage"),
        ("POST", "/v1/reload", b'{"dry_run":"yes"}', 400, "Usage"),
        ("POST", "/v1/swap", b"", 400, "Usage"),
        ("POST", "/v1/swap", b'{"model":"gamma"}', 404, "NoSuchModel"),
        ("POST", "/v1/swap", b'{"model":"./m","drain_timeout":-1}', 400, "Usage"),
        ("POST", "/v1/swap", b'{"model":"./m","drain_timeout":"1"}', 400, "Usage"),
        ("POST", "/v1/swap", b'{"model":"./m","on_failure":"retry"}', 400, "Usage"),
        ("POST", "/v1/swap", b'{"model":"./m","on_failure":{}}', 400, "Usage"),
        ("POST", "/v1/swap", b'{"model":"/m","drain_timeout":' + b"9" * 400 + b"}", 400, "Usage"),
        ("POST", "/v1/swap", b'{"model":"/m","drain_timeout":1e308}', 400, "Usage"),
        ("POST", "/v1/swap", b'{"model":"/m","drain_timeout":1e309}', 400, "Usage"),
        ("POST", "/v1/swap", b'{"model":"/m","drain_timeout":NaN}', 400, "Usage"),
        ("POST", "/v1/swap", b'{"model":"/m","drain_timeout":true}', 400, "Usage"),
        ("POST", "/v1/swap", b'{"model":"/m","force":1}', 400, "Usage"),
        ("POST", "/v1/swap", b'{"model":"/' + b"m" * 900_000 + b'"}', 400, "Usage"),
        ("POST", "/v1/swap", b'{"model":"' + b"m" * 900_000 + b'"}', 400, "Usage"),
        ("POST", "/v1/swap", b'{"model":"\\ud800"}', 400, "Usage"),
        ("POST", "/v1/swap", b'{"model":["/m"]}', 400, "Usage"),
        ("POST", "/v1/restart", b'{"worker":0}', 400, "Usage"),
        ("POST", "/v1/restart", b'{"worker":false}', 400, "Usage"),
        ("POST", "/v1/restart", b'{"worker":[]}', 400, "Usage"),
        ("POST", "/v1/check", b'{"file":"/' + b"x" * 5000 + b'"}', 400, "Usage"),
        ("POST", "/v1/check", b'{"file":"/\\u0000"}', 400, "ConfigInvalid"),
        ("POST", "/v1/check", b'{"file":"/dev/zero"}', 400, "ConfigInvalid"),
        ("POST", "/v1/reset-failed", b'{"worker":"engine-7"}', 404, "NoSuchWorker"),
        ("GET", "/v1/cache", b"", 409, "PromptCacheOff"),
        ("POST", "/v1/cache/flush", b"", 409, "PromptCacheOff"),
        ("POST", "/v1/cache/flush", b'{"all":true}', 400, "Usage"),
        ("GET", "/v1/crashes/7", b"", 404, "NoSuchCrash"),
        ("GET", "/v1/jobs/999999", b"", 404, "NoSuchJob"),
        ("GET", "/v1/jobs/x", b"", 404, "NoSuchJob"),
        ("GET", "/v1/logs?worker=nobody", b"", 404, "NoSuchWorker"),
        ("GET", "/v1/jobs/" + "9" * 5000, b"", 404, "NoSuchJob"),
        ("GET", "/v1/crashes/%D9%A1", b"", 404, "NoSuchCrash"),
        ("GET", "/v1/logs?lines=many", b"", 400, "Usage"),
        ("GET", "/v1/logs?lines=" + "9" * 5000, b"", 400, "Usage"),
        ("GET", "/v1/events?lines=-1", b"", 400, "Usage"),
        ("GET", "/v1/events?lines=1e3", b"", 400, "Usage"),
        ("GET", "/v1/logs?follow=perhaps", b"", 400, "Usage"),
        ("GET", "/v1/nothing", b"", 404, "Usage"),
        ("GET", "/v1/restart", b"", 405, "Usage"),
    ],
)
def test_refusals_are_names_with_a_message(
    client: httpx.Client, method: str, path: str, body: bytes, status: int, error: str
) -> None:
    answer = client.request(method, path, content=body)
    assert (answer.status_code, answer.json()["error"]) == (status, error)
    assert answer.json()["message"]
    assert client.get("/v1/status").json()["ready"]


def test_who_may_mutate() -> None:
    def peer(uid: int, *groups: int) -> Peer:
        return Peer(1, uid, frozenset(groups))

    assert may_mutate(peer(0), own_uid=500, group=70)
    assert may_mutate(peer(500), own_uid=500, group=70)
    assert may_mutate(peer(501, 9, 70), own_uid=500, group=70)
    assert not may_mutate(peer(501, 9), own_uid=500, group=70)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody else")
def test_a_stranger_may_look_but_not_touch(daemon: StandInDaemon) -> None:
    daemon.control.chmod(0o666)
    folder = os.open(daemon.folder, os.O_PATH)
    os.chmod(daemon.folder, 0o755)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        answers = []
        for request in (b"GET /v1/status", b"POST /v1/restart"):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(f"/proc/self/fd/{folder}/control.sock")
                sock.sendall(request + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                head = sock.recv(1 << 16)
                answers.append(head.split()[1])
        os.write(writer, b" ".join(answers))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100) == b"200 403"
    for fd in (folder, reader, writer):
        os.close(fd)
    assert "refused to uid 65534" in daemon.log_text()


@pytest.mark.parametrize("first", [b"", b"G"])
def test_connections_that_say_little_lock_no_client_out(daemon: StandInDaemon, first: bytes) -> None:
    held = []
    try:
        for _ in range(MOST_CONNECTIONS + 20):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(daemon.control))
            sock.settimeout(60)
            sock.send(first)
            held.append(sock)
        assert daemon.status()["ready"]
        assert held[0].recv(1) == b"", "the one that was silent for the longest time gave way"
    finally:
        for sock in held:
            sock.close()
    assert "connections closed on which no request came" in daemon.log_text()


def test_followers_of_the_log_lock_nobody_out(daemon: StandInDaemon) -> None:
    followers = []
    try:
        for _ in range(MOST_CONNECTIONS + 1):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(daemon.control))
            sock.settimeout(60)
            sock.sendall(b"GET /v1/logs?follow=1 HTTP/1.1\r\nHost: x\r\n\r\n")
            followers.append(sock)
            answer = sock.recv(100)
        assert answer.startswith(b"HTTP/1.1 503"), answer
        assert daemon.status()["ready"]
    finally:
        for sock in followers:
            sock.close()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /v1/status HTTP/1.1\r\n" + b"x: y\r\n" * 200 + b"\r\n", 431),
    ],
)
def test_headers_are_bounded(daemon: StandInDaemon, data: bytes, status: int) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(daemon.control))
        sock.settimeout(60)
        sock.sendall(data)
        answer = sock.recv(4096)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b'{"error":"' in answer
