"""The benchmark of constrained rows runs on a model that is nothing but a config, and says what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import grammar
from tiny_models import BASE


def test_each_batch_and_the_pause_are_a_result_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE | {"vocab_size": 2048, "eos_token_id": 2047}))
    words = ["--model", str(tmp_path), "--device", "cpu", "--batches", "2", "--contexts", "4", "--new", "8"]
    words += ["--repeats", "1", "--set", "max_total_token_num=500", "--set", "engine={threads = 1}"]
    monkeypatch.setattr(sys, "argv", ["grammar.py", *words])
    monkeypatch.setattr(grammar.gc, "freeze", lambda: None)
    grammar.main()
    lines = capsys.readouterr().out.splitlines()
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]
    greedy, drawn, pause = results
    assert [greedy["work"], drawn["work"]] == ["decode 2 @ 4 greedy", "decode 2 @ 4 drawn"]
    for told in (greedy, drawn):
        assert told["steps"] == told["tokens"] == 9
        assert {"none_ms", "half_ms", "all_ms", "half_overhead_percent", "half_masks_ms"} <= told.keys()
        assert told["none_masks_ms"] == 0 < told["half_masks_ms"]
    assert pause["beside a compilation"]["compile_s"] > 0
    assert len(pause["alone"]["longest_ms"]) == 3
