"""Client programs with environments of their own, since their pins contradict ours and each other's. Made once by pip
and npm, below ``LIGHTLLMD_CLIENTS_DIR`` (else the folder for temporary files)."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CHOSEN = os.environ.get("LIGHTLLMD_CLIENTS") == "1"
HEAVY = pytest.mark.skipif(not CHOSEN, reason="LIGHTLLMD_CLIENTS=1 installs and runs these client programs")
_FOLDER = Path(os.environ.get("LIGHTLLMD_CLIENTS_DIR") or Path(tempfile.gettempdir()) / "lightllmd-clients")
_PATIENCE = 280  # seconds; a bound, never a measure


def _made(kind: str, words: tuple[str, ...]) -> tuple[Path, bool]:
    """The folder for these words, and whether it is complete."""
    name = hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]
    folder = _FOLDER / f"{kind}-{name}"
    return folder, (folder / "complete").exists()


def python(*packages: str, without: tuple[str, ...] = (), ours: bool = False) -> Path:
    """The interpreter of an environment that has `packages`, as pip names them. `without`: further ones, without what
    they need; `ours`: what is installed for these tests is there, too."""
    folder, complete = _made("python", (*packages, *without))
    interpreter = folder / "bin" / "python"
    if not complete:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(interpreter), "-m", "pip", "install", "-q", "--no-compile"]
        subprocess.run([*install, *packages], check=True)
        if without:
            subprocess.run([*install, "--no-deps", *without], check=True)
        if ours:
            (site,) = folder.glob("lib/python*/site-packages")
            torch = importlib.util.find_spec("torch")
            assert torch is not None
            assert torch.origin is not None
            (site / "ours.pth").write_text(str(Path(torch.origin).parents[1]))
        (folder / "complete").touch()
    return interpreter


def node(*packages: str) -> Path:
    """A folder with `packages` as npm names them with their versions. Skips where there is no npm."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder, complete = _made("node", packages)
    if not complete:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", *packages], cwd=folder, check=True)
        (folder / "complete").touch()
    return folder


def run(*words: str | Path, folder: Path | None = None, **environment: str) -> str:
    """What the program prints; it has to end well. No hub is asked for anything."""
    settings = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | environment
    done = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
