"""What `lightllmd --check` finds beyond the file: the host, the model and the device, asked as a start asks them."""

from __future__ import annotations

import os
import subprocess

import msgspec

from lightllmd.config.parameters import Config
from lightllmd.config.plan import Facts, Plan
from lightllmd.config.resolve import resolve
from lightllmd.errors import ConfigInvalid, Problem, TryAgain
from lightllmd.supervisor.change import planning
from lightllmd.supervisor.children import probing
from lightllmd.supervisor.children.process import child_environment
from lightllmd.supervisor.context import Commands
from lightllmd.supervisor.host import listeners as http_listeners
from lightllmd.supervisor.host import unix_listener
from lightllmd.supervisor.host.runtime_directory import control_socket_path
from lightllmd.supervisor.host.unix_listener import UnixAddress


def look(config: Config, config_file: str | None, commands: Commands | None = None) -> tuple[Plan, list[Problem]]:
    """The plan that a start would make. A model that does not fit in what is free now, but would if the device were
    empty, is no fault of the configuration: a daemon that runs may have the rest. That is told beside the plan. Raises
    LightllmdError."""
    if config.http.tcp:
        for listener in http_listeners.bind(config.params.host, 0, patience=0):
            listener.close()
    unix = UnixAddress.of(config.http)
    control = control_socket_path(config.supervisor.control_socket, os.environ, os.getuid())
    if unix is not None and os.path.dirname(unix.path) != str(control.parent):  # which a start makes
        unix_listener.check(unix)
    facts = _facts(config, config_file, commands or Commands())
    try:
        return resolve(config, facts, config_file), []
    except ConfigInvalid as invalid:
        if invalid.short_of is None:
            raise
        empty = facts.device.with_free(lambda device: device.memory_total)
        return resolve(config, msgspec.structs.replace(facts, device=empty), config_file), invalid.problems


def _facts(config: Config, config_file: str | None, commands: Commands) -> Facts:
    request = msgspec.json.encode(planning.request(config, planning.kept_beside(config)))
    try:
        environment = child_environment(os.environ)
        done = subprocess.run(
            commands.probe(), input=request, capture_output=True, timeout=probing.TIMEOUT, env=environment
        )
    except subprocess.TimeoutExpired:
        raise TryAgain(f"reading model and device took longer than {probing.TIMEOUT:g} s") from None
    last_words = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return probing.answered(done.returncode, done.stdout, "".join(last_words), config, config_file)
