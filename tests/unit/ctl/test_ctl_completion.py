"""Completion scripts come from click, are shipped as generated, and complete verbs and worker names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightllmctl.__main__ import main

SHIPPED = Path(__file__).parents[3] / "packaging" / "completions"


@pytest.mark.parametrize(
    ("shell", "file"), [("bash", "lightllmctl.bash"), ("zsh", "_lightllmctl"), ("fish", "lightllmctl.fish")]
)
def test_the_shipped_script_is_what_the_verb_prints(ctl: Any, shell: str, file: str) -> None:
    """Regenerate: lightllmctl completion SHELL > packaging/completions/FILE"""
    result = ctl("completion", shell)
    assert result.code == 0
    assert "_LIGHTLLMCTL_COMPLETE" in result.out
    assert result.out == (SHIPPED / file).read_text()


def complete(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setenv("_LIGHTLLMCTL_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - (not words.endswith(" "))))
    capsys.readouterr()
    assert main() == 0
    return [line.split(",")[1] for line in capsys.readouterr().out.split()]


def test_verbs_are_completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert complete("lightllmctl is-", monkeypatch, capsys) == ["is-active", "is-ready"]


def test_the_verbs_of_a_verb_are_completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert complete("lightllmctl cache ", monkeypatch, capsys) == ["flush", "stats"]
    assert complete("lightllmctl cache s", monkeypatch, capsys) == ["stats"]


def test_worker_names_are_completed_from_the_daemon(
    daemon: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"lightllmctl --socket {daemon.path} restart "
    assert complete(words, monkeypatch, capsys) == ["api-0", "engine-0", "engine-1"]
    assert complete(words + "eng", monkeypatch, capsys) == ["engine-0", "engine-1"]


def test_model_names_are_completed_from_the_daemon(
    daemon: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.get("/v1/models", [{"name": "small", "served": True}, {"name": "large-1.5"}])
    words = f"lightllmctl --socket {daemon.path} swap "
    assert complete(words, monkeypatch, capsys) == ["small", "large-1.5"]
    assert complete(words + "la", monkeypatch, capsys) == ["large-1.5"]
    assert complete(words + "small --on-failure ", monkeypatch, capsys) == ["rollback", "keep"]


def test_completion_is_silent_without_a_daemon(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complete(f"lightllmctl --socket {short_path}/none logs ", monkeypatch, capsys) == []
    assert capsys.readouterr().err == ""
