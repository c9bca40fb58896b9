"""`--check` finds what a start would: the model's folder and the host, in the same words; --offline the file alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightllmd.config.load import load
from lightllmd.config.plan import DeviceFacts, Facts
from lightllmd.errors import EXIT_CONFIG, EXIT_OK, EXIT_SYSTEM, ConfigInvalid, LightllmdError
from lightllmd.probe.model import model_facts
from lightllmd.supervisor.change import preflight
from lightllmd.supervisor.children.probing import answered
from model_folders import LLAMA, write_folder


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lightllmd", *arguments, "--supervisor.control_socket", str(tmp_path / "control")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def flags(folder: Path, *more: str) -> list[str]:
    return ["--model_dir", str(folder), "--engine.device", "cpu", "--max_req_input_len", "100", "--port", "0", *more]


def no_number(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(LLAMA | {"rms_norm_eps": float("nan")}))
    return folder / "config.json"


def a_pipe(folder: Path) -> Path:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    return folder / "tokenizer.json"


@pytest.mark.parametrize("damage", [no_number, a_pipe])
def test_check_and_start_refuse_a_model_alike(tmp_path: Path, damage: Callable[[Path], Path]) -> None:
    folder = write_folder(tmp_path / "model")
    file = damage(folder)
    checked = run(tmp_path, *flags(folder), "--check", os.devnull)
    assert checked.returncode == EXIT_CONFIG
    [line] = checked.stderr.splitlines()
    assert str(file) in line
    started = run(tmp_path, *flags(folder), "--config", os.devnull)
    assert started.returncode == EXIT_CONFIG
    assert line in started.stderr
    assert run(tmp_path, *flags(folder), "--check", os.devnull, "--offline").returncode == EXIT_OK


def test_a_model_that_can_be_served_is_valid(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    done = run(tmp_path, *flags(folder), "--check", os.devnull)
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_OK, f"{os.devnull}: valid\n", "")
    warned = run(tmp_path, *flags(folder), "--mode", "ppl_fp16", "triton_w8a16", "--check", os.devnull)
    assert (warned.returncode, warned.stdout) == (EXIT_OK, f"{os.devnull}: valid\n")
    assert warned.stderr.startswith("warning: mode ppl_fp16 names a decode kernel of a GPU; ")


@pytest.mark.parametrize("host", ["192.0.2.1", "x" * 100, "a..b"])
def test_the_host_is_tried(host: str) -> None:
    with pytest.raises(LightllmdError) as refused:
        preflight.look(load(None, {"engine.backend": "fake", "host": host}), None)
    assert refused.value.exit_code == EXIT_SYSTEM
    assert host[:40] in refused.value.message


def test_what_does_not_fit_for_now_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that runs may have the rest of the memory."""
    model = model_facts(str(write_folder(tmp_path / "model")))
    config = load(None, {"model_dir": model.path, "engine.device": "cpu", "max_req_input_len": 100})
    for total, fits in ((10**10, True), (10**4, False)):
        device = DeviceFacts("cpu", "Test CPU", 1, total, 10**4, ["float32"], 1)
        monkeypatch.setattr(preflight, "_facts", lambda *_, facts=Facts(model, device): facts)
        if fits:
            plan, [problem] = preflight.look(config, None)
            assert plan.model == model
            assert "fit" in problem.message
        else:
            with pytest.raises(ConfigInvalid, match="fit"):
                preflight.look(config, None)


def test_a_model_beside_that_ends_the_probe_is_no_fault_of_the_configured_one() -> None:
    """The configured one is planned without it then."""
    output = b'{"reading": "/first"}\n{"reading": "/second"}\n'
    with pytest.raises(LightllmdError, match="/second") as refused:
        answered(-11, output, "", load(None, {"model_dir": "/first"}), None)
    assert not isinstance(refused.value, ConfigInvalid)
    with pytest.raises(ConfigInvalid, match=r"/second: reading .* ends its reader by SIGSEGV"):
        answered(-11, output, "", load(None, {"model_dir": "/second"}), None)
