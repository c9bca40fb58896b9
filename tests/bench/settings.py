"""Settings on a benchmark's command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli


def settings(pairs: list[str]) -> dict[str, Any]:
    """KEY=VALUE with a value in TOML, or a bare word. Keys as LLM takes them."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, _, text = pair.partition("=")
        try:
            found[key] = tomli.loads(f"value = {text}")["value"]
        except tomli.TOMLDecodeError:
            found[key] = text
    return found


def load_way(model: str, asked: str | None) -> str:
    """What was asked for; else random weights for a directory that has none."""
    folder = Path(model)
    bare = folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.gguf"))
    return asked or ("DUMMY" if bare else "HF")
