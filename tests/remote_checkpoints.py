"""Tiny checkpoints that bring code of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model_folders import write_folder

CONFIG_CODE = """\
from transformers import PretrainedConfig


class OddConfig(PretrainedConfig):
    model_type = "llama"

    def __init__(self, width=8, **rest):
        super().__init__(**{**rest, "hidden_size": 2 * width, "vocab_size": 100})
"""


def write_code(folder: Path, files: Mapping[str, str], **maps: Mapping[str, Any]) -> Path:
    """A tiny llama with .py files beside it; `maps`: settings file without ".json" -> entries to put into it."""
    write_folder(folder)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name, entries in maps.items():
        path = folder / f"{name}.json"
        settings = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(settings | entries))
    return folder
