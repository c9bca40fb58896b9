"""Where compiled kernels are kept: by version and card, in the cache directory, or where the operator says."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightllmd.config.parameters import Config, EngineSettings
from lightllmd.config.plan import Budget, DeviceFacts, Plan
from lightllmd.engine import kernel_cache

CARD = "NVIDIA H100 80GB HBM3"


def plan(kind: str = "cuda", backend: str = "auto") -> Plan:
    return Plan(
        config=Config(engine=EngineSettings(backend=backend)),
        model=None,
        device=DeviceFacts(kind, CARD, 1, 1, 1, ["float16"], 1),
        derived=[],
        budget=Budget([], 0),
        max_total_token_num=1,
        batch_max_tokens=1,
        eos_id=[],
        data_type="float16",
        tokenizer_mode="fast",
        log_stats_interval=1.0,
        vocab_size=1,
        model_name="m",
    )


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CACHE_DIRECTORY", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(kernel_cache.VARIABLE, "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    ("given", "root"),
    [
        ({"CACHE_DIRECTORY": "{}/a:{}/b", "XDG_CACHE_HOME": "{}/x"}, "a"),
        ({"CACHE_DIRECTORY": "", "XDG_CACHE_HOME": "{}/x"}, "x/lightllmd"),
        ({"XDG_CACHE_HOME": "relative"}, "home/.cache/lightllmd"),
        ({}, "home/.cache/lightllmd"),
    ],
)
def test_the_cache_is_systemds_else_the_users(
    given: dict[str, str], root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value.format(tmp_path, tmp_path))
    kernel_cache.settle(plan())
    folder = Path(os.environ[kernel_cache.VARIABLE])
    assert folder == tmp_path / root / "kernels" / kernel_cache.key(CARD)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_folder_carries_versions_and_card(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"triton": "3.6.0", "torch": "2.11.0+cu130"}
    monkeypatch.setattr(kernel_cache.metadata, "version", versions.__getitem__)
    assert kernel_cache.key(CARD) == "3.6.0-2.11.0+cu130-nvidia-h100-80gb-hbm3"


def test_a_cache_that_cant_be_written_is_replaced_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "file"))
    monkeypatch.setattr(kernel_cache.tempfile, "tempdir", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        kernel_cache.settle(plan())
    folder = Path(os.environ[kernel_cache.VARIABLE])
    assert folder.parent == tmp_path
    assert folder.is_dir()
    assert "makes them again" in caplog.text


def test_what_the_operator_set_stays_and_a_cpu_needs_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for other in (plan("cpu"), plan(backend="fake")):
        kernel_cache.settle(other)
        assert not os.environ[kernel_cache.VARIABLE]
    monkeypatch.setenv(kernel_cache.VARIABLE, "/elsewhere")
    kernel_cache.settle(plan())
    assert os.environ[kernel_cache.VARIABLE] == "/elsewhere"


def test_it_comes_before_torch_and_triton() -> None:
    probe = "import sys, lightllmd.engine.kernel_cache; print(sorted({'torch', 'triton'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert result.stdout == "[]\n", result.stderr
