"""A model whose files change under a daemon that serves it: never mixed, tried again, taken up by a reload."""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx
import pytest

from closed_loop import Operator, Timeline
from harness import Daemon, wait_for
from long_run import LONG
from model_folders import fill, write_folder

ASKED = {"inputs": "ab", "parameters": {"max_new_tokens": 8, "ignore_eos": True, "return_details": True}}


def health(daemon: Daemon) -> str:
    """Why it is not ready."""
    answer = httpx.get(f"{daemon.url}/health", timeout=60)
    return answer.text if answer.status_code == 503 else ""


def generated(daemon: Daemon) -> str:
    answer = httpx.post(f"{daemon.url}/generate", json=ASKED, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.text


@pytest.mark.timeout(300)
def test_a_restart_on_other_files_is_refused_and_a_reload_takes_them(tmp_path: Path) -> None:
    """With real weights, since the fake engine reads none: each engine costs torch's imports. That the same plan goes
    on when the files are put back is for the long tests."""
    folder = write_folder(tmp_path / "model", "F32", torch_dtype="float32")
    fill(folder, 1)
    flags = [
        "--model_dir",
        str(folder),
        "--engine.device",
        "cpu",
        "--engine.threads",
        "1",
        "--max_total_token_num",
        "4000",
    ]
    flags += ["--max_req_input_len", "1000", "--max_req_total_len", "2000", "--supervisor.backoff_max", "1"]
    weights, backup = folder / "model.safetensors", tmp_path / "backup"
    with Daemon(tmp_path / "daemon", *flags, fake=False).start() as daemon:
        first = generated(daemon)
        shutil.copy(weights, backup)
        if LONG:
            weights.write_bytes(weights.read_bytes()[:-100])
            daemon.kill("engine")
            wait_for(lambda: "bytes): put it back" in health(daemon), what="a refusal")
            shutil.copyfile(backup, weights)
            daemon.wait_ready()
            assert generated(daemon) == first
        fill(folder, 2)
        daemon.kill("engine")
        wait_for(lambda: "its content is another" in health(daemon), what="a refusal")
        assert "in force: model_dir" in Operator(daemon, Timeline("the model")).reload().output
        daemon.wait_ready()
        assert generated(daemon) != first
