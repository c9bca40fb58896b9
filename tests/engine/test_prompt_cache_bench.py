"""The benchmark of the prompt cache runs on a model that is nothing but a config, and tells of every share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tiny_models import BASE

SCRIPT = Path(__file__).parents[1] / "bench" / "prompt_cache.py"


def test_each_share_is_a_result_line_and_a_row_of_the_table(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    words = ["--prompt", "100", "--shares", "50,90", "--requests", "4", "--new", "3", "--repeats", "2"]
    words += ["--device", "cpu", "--dtype", "float32", "--set", "engine={threads = 1}"]
    command = [sys.executable, str(SCRIPT), "--model", str(tmp_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    results = [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]
    assert [result["work"] for result in results] == [f"100 tokens, {share} % shared" for share in (50, 90)]
    for result in results:
        first = result["first_token_ms"]
        assert first.keys() == {"cold", "warm", "behind", "alone", "warm_host"}
        assert all(first[name] > 0 for name in ("cold", "warm", "behind", "alone"))
        assert first["warm_host"].keys() == {"schedule", "launch", "wait", "complete"}
        assert result["goal"] == 1.15
        assert min(result[key] for key in result if key.startswith(("warm_to", "requests"))) > 0
    assert [line.split()[:3] for line in lines[-2:]] == [["50", "%", "shared"], ["90", "%", "shared"]]
