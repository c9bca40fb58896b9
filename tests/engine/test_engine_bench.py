"""The engine's benchmark runs on a model that is nothing but a config, and says what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tiny_models import BASE

SCRIPT = Path(__file__).parents[1] / "bench" / "engine.py"


def test_each_measurement_is_a_result_line_and_a_row_of_the_table(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    words = ["--work", "decode,prefill", "--batches", "1,2,99", "--context", "16", "--prefills", "8,2x8"]
    words += ["--rows", "4", "--repeats", "1", "--device", "cpu", "--dtype", "float32"]
    words += ["--set", "max_total_token_num=2000", "--set", "engine={threads = 1}"]
    words += ["--profile", str(tmp_path / "profile"), "--profile-context", "16", "--profile-prefill", "8"]
    command = [sys.executable, str(SCRIPT), "--model", str(tmp_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]
    works = ["start", "decode 1 @ 16", "decode 2 @ 16", "prefill 1x8", "prefill 2x8"]
    assert [result["work"] for result in results] == works
    assert all(result["value"] > 0 for result in results)
    assert [result["unit"] for result in results] == ["s", "ms", "ms", "ms", "tokens/s"]
    assert {"commit", "card", "dtype", "mode", "percent_of_limit", "peer", "goal"} <= results[0].keys()
    assert results[1]["host_ms_per_step"].keys() == {"schedule", "launch", "wait", "complete"}
    assert "decode 99 @ 16: skipped, the KV cache is too small for it" in lines
    table = next(at for at, line in enumerate(lines) if line.startswith("work "))
    assert lines[table].split()[-5:] == ["limit", "%", "limit", "peer", "goal"]
    assert [line[: len(work)] for line, work in zip(lines[table + 1 :], works, strict=False)] == works
    profile = (tmp_path / "profile").read_text()
    assert "decode, batch 1 at context 16, per step" in profile
    assert "prefill of 8 tokens" in profile
