"""A pod of the Kubernetes manifests, as processes of this machine: the manifests' user, root, volumes and words."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from harness import free_port, wait_for
from kubernetes_manifests import configuration, container_of, pod_command, pod_templates, rendered

pytestmark = pytest.mark.skipif(
    os.getuid() != 0 or not all(map(shutil.which, ("unshare", "setpriv", "nsenter"))),
    reason="needs root, unshare, setpriv and nsenter",
)


class Pod:
    """One container of the overlay cpu-demo, with the fake engine."""

    def __init__(self, folder: Path) -> None:
        resources = rendered("cpu-demo")
        [self.template] = pod_templates(resources)
        self.container = container_of(self.template)
        for name in ("config", "root"):
            (folder / name).mkdir()
        (folder / "config" / "lightllmd.toml").write_text(configuration(resources))
        for path in (folder, *folder.parents):
            if path.stat().st_mode & 0o005 != 0o005 and path.owner() == "root":
                path.chmod(path.stat().st_mode | 0o005)
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        flags = ["--port", str(port), "--engine.backend", "fake", "--engine.fake.tokens_per_second", "50"]
        command = pod_command(self.template, {"config": folder / "config"}, folder / "root", *flags)
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    @property
    def daemon(self) -> psutil.Process:
        """Process 1 of the pod, by its number here."""
        [child] = psutil.Process(self.process.pid).children()
        return child

    def ask(self, probe: str) -> int:
        """The status of a probe by HTTP; 0: there is no answer."""
        try:
            return httpx.get(self.url + self.container[probe]["httpGet"]["path"], timeout=2).status_code
        except httpx.TransportError:
            return 0

    def alive(self, timeout: float = 60.0) -> bool:
        """Whether the liveness probe's command ends well, inside the pod."""
        words = self.container["livenessProbe"]["exec"]["command"]
        program = [sys.executable, "-m", *words]
        inside = ["nsenter", f"--target={self.daemon.pid}", "--mount", "--pid", "--root", "--wd", "--setuid=10001"]
        environment = {one["name"]: one["value"] for one in self.container["env"]}
        try:
            return subprocess.run([*inside, *program], env=environment, timeout=timeout, check=False).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def engine(self) -> psutil.Process | None:
        for child in self.daemon.children():
            if "lightllmd.engine" in child.cmdline():
                return child
        return None

    def stream(self, tokens: int) -> Stream:
        return Stream(self.url, tokens)


class Stream(threading.Thread):
    """A client that reads an answer; `begun` with its first token."""

    def __init__(self, url: str, tokens: int) -> None:
        super().__init__(daemon=True)
        self.begun = threading.Event()
        self.tokens, self._url, self._wanted = 0, url, tokens
        self.start()

    def run(self) -> None:
        parameters = {"max_new_tokens": self._wanted, "ignore_eos": True}
        body: dict[str, Any] = {"inputs": "a", "parameters": parameters}
        with httpx.stream("POST", f"{self._url}/generate_stream", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if '"token"' in line:
                    self.tokens += 1
                    self.begun.set()


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    pod = Pod(tmp_path)
    try:
        wait_for(lambda: pod.process.poll() is not None or pod.ask("startupProbe") == 200, what="the startup probe")
        assert pod.process.poll() is None, pod.log.read_text()
        yield pod
    finally:
        if pod.process.poll() is None:
            pod.process.kill()  # the pod's processes go with it
            pod.process.wait()


def test_probes_tell_a_dead_engine_from_a_hung_daemon_and_the_end_drains(pod: Pod) -> None:
    wait_for(lambda: pod.ask("readinessProbe") == 200, what="readiness")
    user = pod.template["spec"]["securityContext"]["runAsUser"]
    assert {process.uids().real for process in (pod.daemon, *pod.daemon.children(recursive=True))} == {user}
    assert pod.alive()

    # The engine dies: not ready, but alive, and the stream goes on.
    stream = pod.stream(60)
    assert stream.begun.wait(60)
    engine = pod.engine()
    assert engine is not None
    engine.kill()
    wait_for(lambda: pod.ask("readinessProbe") == 503, what="the loss to be told")
    assert pod.ask("startupProbe") == 200
    assert pod.alive()
    stream.join(60)
    assert stream.tokens == 60
    wait_for(lambda: pod.ask("readinessProbe") == 200, what="readiness again")

    # The supervisor hangs: whatever its workers still answer, the pod is to be restarted.
    pod.daemon.suspend()
    assert pod.ask("readinessProbe") == 200
    assert not pod.alive(timeout=2)
    pod.daemon.resume()
    assert pod.alive()

    # SIGTERM: what is in flight ends well, then the container does.
    stream = pod.stream(100)
    assert stream.begun.wait(60)
    pod.daemon.send_signal(signal.SIGTERM)
    stream.join(60)
    assert stream.tokens == 100
    assert pod.process.wait(pod.template["spec"]["terminationGracePeriodSeconds"]) == 0
