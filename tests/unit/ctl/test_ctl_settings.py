"""`lightllmctl config`: a daemon's configuration is told as a file that says the same."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from lightllmctl.commands.settings import to_toml
from lightllmd.config.load import load
from lightllmd.config.parameters import Config

WRITTEN = """
model_dir = "m"
mode = ["triton_w4a16"]
[quantise]
rules = ["0: dense"]
[models."a.1"]
model_dir = "a"
data_type = "float32"
[models."a.1".quantise]
rules = ["1: dense", "qkv: w8a16"]
"""


def test_what_is_told_loads_as_what_was_written(tmp_path: Path) -> None:
    def loaded(text: str) -> Config:
        file = tmp_path / "lightllmd.toml"
        file.write_text(text)
        return msgspec.structs.replace(load(str(file)), places={}, held_keys=None)

    config = loaded(WRITTEN)
    assert config.params.quantise.rules == ["0: dense"]
    assert loaded(to_toml(json.loads(msgspec.json.encode(config)))) == config
