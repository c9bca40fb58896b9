"""A daemon whose settings all stand in its file, so that a reload may change any of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness import Daemon


class Settings:
    """The file's settings by dotted key, "port" or "models.NAME.model_dir"; `in_force`: what the daemon last took."""

    def __init__(self, file: Path, in_force: dict[str, Any]) -> None:
        self.file, self.in_force = file, in_force
        self.write({})

    def write(self, changes: dict[str, Any]) -> dict[str, Any]:
        """What is in force with these changes; returns all of it."""
        settings = self.in_force | changes
        tables: dict[str, list[str]] = {"": []}
        for key, value in settings.items():
            table, _, name = key.rpartition(".")
            tables.setdefault(table, []).append(f"{name} = {json.dumps(value)}")
        parts = ["\n".join([f"[{table}]"] * bool(table) + lines) for table, lines in tables.items()]
        self.file.write_text("\n".join(parts) + "\n")
        return settings


def daemon_of_a_file(folder: Path, settings: dict[str, Any]) -> tuple[Daemon, Settings]:
    """Not started."""
    daemon = Daemon(folder, fake=False)
    port = daemon.command.index("--port")
    del daemon.command[port : port + 2]
    return daemon, Settings(folder / "lightllmd.toml", {"port": daemon.port, **settings})


def config_in_force(daemon: Daemon) -> dict[str, Any]:
    with daemon.control_client() as control:
        return control.get("/v1/config").json()


def value_of(config: dict[str, Any], key: str) -> Any:
    """Parameters stand at the top of the file, and in a table of their own in the daemon's answer."""
    node: Any = config
    for part in key.split(".") if "." in key else ("params", key):
        node = node[part]
    return node
