"""A model that scores through the whole process tree: swapped for one that generates and back, killed, reloaded."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from closed_loop import ctl
from harness import Daemon, wait_for
from lightllmd.engine.runners.fake_model import fake_score, fake_token
from swap_models import write_fake_models

MOST = 24  # requests at a time


def daemon_of_both_kinds(folder: Path) -> Daemon:
    """Serves `writer`, which generates, first; `rater` scores. Not started."""
    models = write_fake_models(folder / "models", "writer", "rater", greedy="memory")
    daemon = Daemon(folder / "daemon", "--model_dir", str(models["writer"]), "--supervisor.backoff_initial", "0.05")
    tables = "".join(f'[models.{name}]\nmodel_dir = "{path}"\n' for name, path in models.items() if name != "rater")
    tables += f'[models.rater]\nmodel_dir = "{models["rater"]}"\nuse_reward_model = true\n'
    (daemon.folder / "lightllmd.toml").write_text(
        f'health_monitor = true\n[engine.fake]\nfault_file = "fault"\n{tables}'
    )
    return daemon


@pytest.mark.timeout(240)
def test_both_kinds_take_each_others_place_and_a_kill_costs_no_score(tmp_path: Path) -> None:
    rater = str(tmp_path / "models" / "rater")
    with daemon_of_both_kinds(tmp_path).start() as daemon, httpx.Client(base_url=daemon.url, timeout=60) as client:

        def score(text: str) -> httpx.Response:
            return client.post("/get_score", json={"chat": text})

        def right(text: str) -> float:
            return fake_score(list(text.encode()), 0, rater)

        def generate() -> httpx.Response:
            return client.post("/generate", json={"inputs": "Hi", "parameters": {"max_new_tokens": 3}})

        def written() -> str:
            writer = str(tmp_path / "models" / "writer")
            return bytes(fake_token(list(b"Hi"), 0, 0, position, writer) for position in range(3)).decode()

        assert generate().json()["generated_text"] == [written()]
        assert score("a").status_code == 400
        assert ctl(daemon, "swap", "rater").code == 0
        assert score("a").json()["score"] == right("a")
        assert "use_reward_model" in generate().json()["message"]

        # Killed with requests in its queue, and none of them answered.
        engine = daemon.pid("engine")
        assert engine is not None
        os.kill(engine, signal.SIGSTOP)
        texts = [f"text {number}" for number in range(MOST)]
        with ThreadPoolExecutor(MOST) as pool:
            asked = [pool.submit(score, text) for text in texts]
            wait_for(lambda: daemon.status()["requests"]["in_flight"] == MOST)
            os.kill(engine, signal.SIGKILL)
            for text, one in zip(texts, asked, strict=True):
                assert one.result().json()["score"] == right(text)
        wait_for(lambda: not psutil.pid_exists(engine))

        # A swap that fails brings the model that scores back; a reload keeps it.
        assert ctl(daemon, "swap", "greedy").code == 9
        assert score("b").json()["score"] == right("b")
        file = daemon.folder / "lightllmd.toml"
        file.write_text(
            file.read_text().replace("use_reward_model = true", "use_reward_model = true\nmax_req_input_len = 9")
        )
        assert ctl(daemon, "reload").code == 0
        assert score("c").json()["score"] == right("c")
        assert score("more than nine").status_code == 400

        assert ctl(daemon, "swap", "writer").code == 0
        assert generate().json()["generated_text"] == [written()]
        assert score("a").status_code == 400
        assert daemon.status()["requests"]["failed"] == 0
