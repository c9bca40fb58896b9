"""What the supervisor imports and weighs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from harness import Daemon

HEAVY = ("torch", "transformers", "pydantic", "fastapi", "numpy", "psutil", "zmq", "prometheus_client", "httpx")


def test_supervisor_imports_nothing_heavy() -> None:
    code = "import sys, lightllmd.supervisor.main; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not set(HEAVY) & set(answer.stdout.split())


def test_supervisor_weighs_less_than_60_mb(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        for _ in range(50):
            daemon.status()
        memory = Path(f"/proc/{daemon.process.pid}/status").read_text()
        loaded = Path(f"/proc/{daemon.process.pid}/maps").read_text()
    kilobytes = int(re.search(r"VmHWM:\s+(\d+) kB", memory)[1])
    print(f"supervisor: {kilobytes / 1000:.1f} MB at its peak")
    assert kilobytes < 60_000
    assert "libtorch" not in loaded
