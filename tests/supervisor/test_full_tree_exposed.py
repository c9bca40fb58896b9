"""Keys, limits, TLS and the Unix socket through the whole process tree, while its parts are killed and replaced."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from config_file import daemon_of_a_file
from harness import wait_for
from lightllmd.config import key_editing
from lightllmd.config.keys import ApiKey, hashed
from tls_files import Made, make

LIMIT = 10_000  # tokens per minute
TOKENS = 60


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name leaves room for a socket's 107 bytes."""
    made = Path(tempfile.mkdtemp(prefix="exposed-"))
    yield made
    shutil.rmtree(made)


def test_an_exposed_daemon_keeps_its_word_while_its_parts_die(tmp_path: Path, short: Path) -> None:
    first, renewed = make(tmp_path, "first"), make(tmp_path, "renewed", days=200)
    serving = make(tmp_path, "serving")
    serving.put(first)
    keys, socket = tmp_path / "keys.toml", short / "http.sock"
    keys.write_text("[keys]\n")
    keys.chmod(0o640)
    daemon, settings = daemon_of_a_file(
        tmp_path,
        {
            "engine.backend": "fake",
            "engine.fake.tokens_per_second": 40,
            "http.api_keys_file": str(keys),
            "http.unix_socket": str(socket),
            "supervisor.backoff_initial": 0.1,
            **{f"http.{name}": value for name, value in serving.settings.items()},
        },
    )
    url = f"https://localhost:{daemon.port}"

    def over_tls(made: Made) -> int:
        with httpx.Client(verify=made.client()) as client:
            return client.get(f"{url}/health", timeout=60).status_code

    def serves(made: Made) -> bool:
        try:
            return over_tls(made) == 200
        except httpx.TransportError:
            return False

    def local(path: Path = socket) -> httpx.Client:
        return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://local", timeout=60)

    def reload() -> dict[str, Any]:
        """The job's last state. lightllmctl would take a second of each."""
        with daemon.control_client() as control:
            number = control.post("/v1/reload").json()["id"]
            lines = control.get(f"/v1/jobs/{number}", timeout=60).text.splitlines()
        return json.loads([line for line in lines if line][-1])

    def fault() -> str:
        return (daemon.status() or {})["certificate"]["fault"]

    with daemon.start():
        assert over_tls(first) == 200
        secret = key_editing.new_key()
        alice = ApiKey(name="alice", sha256=hashed(secret), tokens_per_minute=LIMIT, max_concurrent=1)
        key_editing.add(str(keys), alice)
        assert reload()["outcome"] == "done"
        headers = {"x-api-key": secret}
        body = {"inputs": "hello", "parameters": {"max_new_tokens": TOKENS}}
        with local() as client:
            assert client.post("/generate", json=body).status_code == 401

        with daemon.control_client() as control:
            told = [control.get(path).text for path in ("/v1/config", "/v1/config?effective=1", "/v1/status")]
        assert not any(secret in text or hashed(secret) in text for text in told)

        # A stream over TLS: its engine is killed, its certificate renewed.
        answer: list[httpx.Response] = []

        def ask() -> None:
            with httpx.Client(verify=first.client(), timeout=60) as client:
                answer.append(client.post(f"{url}/generate_stream", json=body, headers=headers))

        asking = threading.Thread(target=ask)
        asking.start()
        wait_for(lambda: (daemon.status() or {})["requests"]["running"] == 1, what="a running stream")
        with local() as client:
            assert client.post("/generate", json=body, headers=headers).json()["message"].endswith("(max_concurrent)")
        serving.put(renewed)
        daemon.kill("engine")
        wait_for(lambda: serves(renewed), what="the renewed certificate")
        asking.join(60)
        assert answer[0].text.count("data:") == TOKENS
        body["parameters"] = {"max_new_tokens": 1}
        with local() as client:
            left = client.post("/generate", json=body, headers=headers).headers["x-ratelimit-remaining-tokens"]
        # What the killed engine had made counts once; little comes back meanwhile.
        assert LIMIT - 5 - TOKENS - 5 - 1 <= int(left) <= LIMIT

        # A broken pair is told, refused by a reload, and a new api worker serves with the one in force.
        serving.key.write_text("broken")
        wait_for(fault, what="the broken key")
        daemon.kill("api")
        wait_for(lambda: serves(renewed), what="the api worker")
        refused = reload()
        assert (refused["outcome"], refused["error"]["error"]) == ("failed", "ConfigInvalid")
        assert "http.tls_key" in refused["message"]
        serving.put(renewed)
        wait_for(lambda: not fault(), what="a sound key")

        # Another path for the socket; the worker before it is replaced.
        settings.in_force = settings.write({"http.unix_socket": str(short / "other.sock")})
        assert reload()["outcome"] == "done"
        assert not socket.exists()
        with local(short / "other.sock") as client:
            assert client.get("/v1/models", headers=headers).status_code == 200
        assert over_tls(renewed) == 200
        key_editing.revoke(str(keys), "alice")
        with local(short / "other.sock") as client:
            told = "the revoked key's refusal"
            wait_for(lambda: client.get("/v1/models", headers=headers).status_code == 401, what=told)

        for process in daemon.processes():
            told = Path(f"/proc/{process.pid}/environ").read_bytes() + Path(f"/proc/{process.pid}/cmdline").read_bytes()
            assert secret.encode() not in told
        assert daemon.stop() == 0
    assert os.listdir(short) == []
    assert secret not in daemon.log_text()
    assert "401 to a local client for '/generate': API key missing" in daemon.log_text()
