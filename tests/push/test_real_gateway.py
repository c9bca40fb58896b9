"""A real Pushgateway takes what is pushed, and shows it; where there is one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from harness import Daemon, free_port, wait_for
from push_scene import GROUP, PushScene, count_something
from real_gateway import lint, pushgateway, samples

PASSWORD = "s3cret ü"
# bcrypt of it, at the lowest cost
USERS = "basic_auth_users: {operator: '$2b$04$7WVgD29PQkrk8hFsgT409ekbpfI3a9Q443XI7Ks6k3zV.VhS.7XG.'}\n"
JOB = {"job": "lightllm"}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gateway() -> Iterator[str]:
    with pushgateway() as address:
        yield address


def shown(gateway: str) -> str:
    return httpx.get(f"http://{gateway}/metrics", trust_env=False).text


def groups(gateway: str) -> list[dict[str, str]]:
    """The labels of each, the job first."""
    answer = httpx.get(f"http://{gateway}/api/v1/metrics", trust_env=False).json()
    return [dict(sorted(group["labels"].items(), key=lambda label: label[0] != "job")) for group in answer["data"]]


def pushed(scene: PushScene) -> None:
    """Once more than so far."""
    before = scene.last.stats["pushes"] if scene.last else 0.0
    scene.beat(lambda stats: stats["pushes"] > before and "pushed_at" in stats and not stats["failing"])


@pytest.mark.parametrize(
    ("job", "labels"),
    [
        ("lightllm", {}),
        ("a/b c", {"path": "/srv/models/", "slash": "/", "text": "a b  c+d"}),
        ("größe", {"text": "ä\n\t\"'\\", "query": "x=1&y=2?#;:@%41", "dots": "..."}),
        ("lightllm", {"empty": "", "instance": "node7"}),
    ],
)
def test_any_text_is_the_label_that_the_gateway_shows(
    job: str, labels: dict[str, str], gateway: str, tmp_path: Path
) -> None:
    with PushScene(tmp_path, gateway, job=job, grouping_key=labels, interval=3600) as scene:
        pushed(scene)
        assert groups(gateway) == [{"job": job, **labels}]


def test_a_push_replaces_its_own_group_and_no_other(gateway: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        count_something(tmp_path / name, 1)
    count_something(tmp_path / "one", 5, "another")
    other = {"instance": "node8"}
    with (
        PushScene(tmp_path / "one", gateway, interval=3600) as one,
        PushScene(tmp_path / "two", gateway, interval=3600, grouping_key=other) as two,
    ):
        pushed(one)
        pushed(two)
        assert samples(shown(gateway), JOB | GROUP) == {"lightllm_test_total": 1.0, "lightllm_another_total": 5.0}
        (tmp_path / "one" / "counter_another.db").unlink()
        one.change()
        pushed(one)
        assert samples(shown(gateway), JOB | GROUP) == {"lightllm_test_total": 1.0}
        assert samples(shown(gateway), JOB | other) == {"lightllm_test_total": 1.0}
        one.change(grouping_key={"zone": "a"})
        pushed(one)
    expected = [JOB | GROUP, JOB | other, JOB | {"zone": "a"}]
    assert sorted(groups(gateway), key=str) == sorted(expected, key=str), "the old group is left"


def test_only_the_right_password_enters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "users.yml").write_text(USERS)
    with (
        pushgateway(None, f"--web.config.file={tmp_path / 'users.yml'}") as gateway,
        PushScene(tmp_path, gateway, user="operator", password="s3cret") as scene,
    ):
        scene.beat(lambda stats: stats["push_failures"] >= 2)
        scene.change(user=None, password=None)
        scene.beat(lambda stats: stats["push_failures"] >= 4)
        scene.change(user="operator", password=PASSWORD)
        pushed(scene)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert ["401 Unauthorized" in warning for warning in warnings] == [True, True]
    assert "s3cret" not in caplog.text


def test_a_gateway_that_finds_a_contradiction_is_told_once_and_pushed_to_when_it_is_gone(
    gateway: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    count_something(tmp_path, 1)
    strange = f"http://{gateway}/metrics/job/strange"
    text = "# TYPE lightllm_test_total gauge\nlightllm_test_total 1\n"
    assert httpx.put(strange, content=text, trust_env=False).status_code == 200
    with PushScene(tmp_path, gateway) as scene:
        scene.beat(lambda stats: stats["push_failures"] >= 3)
        assert httpx.delete(strange, trust_env=False).status_code == 202
        pushed(scene)
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "400 Bad Request" in warning
    assert "inconsistent with existing metrics" in warning


def test_a_gateway_that_restarts_is_pushed_to_again(tmp_path: Path) -> None:
    port = free_port()
    with pushgateway(port) as gateway:
        scene = PushScene(tmp_path, gateway)
        with scene:
            pushed(scene)
    with PushScene(tmp_path, gateway) as scene:
        scene.beat(lambda stats: stats["failing"])
        with pushgateway(port):
            pushed(scene)
            scene.stop()


# --- the daemon ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """What /metrics and the gateway showed in the same second, and what the gateway shows after the daemon's end."""

    metrics: str
    gateway: str
    at_the_end: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    flags = ("--push_interval", "1", "--grouping_key", "instance=node7", "--use_dynamic_prompt_cache")
    with pushgateway() as gateway, httpx.Client(trust_env=False, timeout=60) as client:
        folder = tmp_path_factory.mktemp("daemon")
        with Daemon(folder, "--metric_gateway", gateway, *flags, "--http.workers", "2") as daemon:
            for tokens in (1, 5, 20):
                body = {"inputs": "a question", "parameters": {"max_new_tokens": tokens}}
                assert client.post(f"{daemon.url}/generate", json=body).status_code == 200
            assert client.post(f"{daemon.url}/generate", json={}).status_code == 400

            def same() -> tuple[str, str] | None:
                here, there = client.get(f"{daemon.url}/metrics").text, shown(gateway)
                return (here, there) if samples(here) == samples(there, JOB | GROUP) else None

            here, there = wait_for(same, what="a push of what /metrics shows")
            assert daemon.stop() == 0
        return Served(here, there, shown(gateway))


def test_what_arrives_is_what_metrics_shows(served: Served) -> None:
    found = samples(served.gateway, JOB | GROUP)
    assert found == samples(served.metrics)
    assert found["lightllm_request_count_total"] == 4.0
    assert found["lightllm_push_count_total"] >= 1
    assert len(found) > 500


def test_no_process_number_is_a_label(served: Served) -> None:
    assert "pid=" not in served.metrics + served.gateway


def test_promtool_finds_nothing_in_metrics_nor_on_the_gateway(served: Served) -> None:
    assert lint(served.metrics) == ""
    assert lint(served.gateway) == ""
    assert lint(served.at_the_end) == ""


def test_a_stop_leaves_the_final_counts_and_no_gauge_of_the_living(served: Served) -> None:
    before, after = samples(served.gateway, JOB | GROUP), samples(served.at_the_end, JOB | GROUP)
    assert after["lightllm_push_count_total"] > before["lightllm_push_count_total"]
    gone = {"batch_current_size", "queue_size", "batch_pause_size", "batch_current_max_tokens", "prompt_cache_tokens"}
    assert {f"lightllm_{name}" for name in gone} <= before.keys() - after.keys()
    kept = before.keys() & after.keys() - {"lightllm_push_count_total"}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
