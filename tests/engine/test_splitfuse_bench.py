"""The benchmark of splitfuse_mode runs on a model that is nothing but a config, and tells of every engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tiny_models import BASE

SCRIPT = Path(__file__).parents[1] / "bench" / "splitfuse.py"


def test_each_block_size_and_the_stall_without_are_a_result_line_and_a_row_of_the_table(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    words = ["--streams", "2", "--context", "8", "--prompt", "100", "--block", "32,64", "--tokens", "5"]
    words += ["--repeats", "1", "--device", "cpu", "--dtype", "float32"]
    words += ["--set", "max_total_token_num=2000", "--set", "engine={threads = 1}"]
    command = [sys.executable, str(SCRIPT), "--model", str(tmp_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]
    assert [result["splitfuse_block_size"] for result in results] == [32, 64, None]
    assert [result["goal"] for result in results] == [2.0, 2.0, None]
    for result in results:
        alone, beside = result["undisturbed"], result["beside_a_prompt"]
        assert 0 < alone["p50_ms"] <= alone["p99_ms"] <= alone["worst_ms"]
        assert 0 < beside["p50_ms"] <= beside["p99_ms"] <= beside["worst_ms"]
        assert beside["first_token_ms"] > 0
    assert [line.split()[0] for line in lines[-3:]] == ["splitfuse,", "splitfuse,", "without,"]
