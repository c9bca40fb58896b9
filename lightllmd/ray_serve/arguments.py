"""What `build` takes, checked."""

from __future__ import annotations

import difflib
from typing import Any

import msgspec

from lightllmd.config.parameters import Config
from lightllmd.errors import ConfigInvalid, Problem


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `build` takes."""

    config: str | None = None  # path of a lightllmd.toml on every node
    settings: dict[str, Any] = {}  # or its settings: tables within tables, or dotted keys
    num_cpus: float = 1.0  # of a replica, as Ray counts them
    num_gpus: float | None = None  # None: one for each rank of each engine replica, none where engine.device is "cpu"
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float = 32.0  # of a replica; above it the autoscaler adds one
    max_ongoing_requests: int = 1024  # of a replica; what is more waits in Serve's proxy
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 600.0  # a model has to be loaded again


def gpus(asked: Arguments, config: Config) -> float:
    """Of a replica: all that its daemon plans with."""
    if asked.num_gpus is not None:
        return asked.num_gpus
    if config.engine.device == "cpu" or config.engine.backend == "fake":
        return 0.0
    return float(config.params.tp * config.engine.replicas)


def read(given: dict[str, Any]) -> Arguments:
    """Raises ConfigInvalid, which names the argument."""
    known = Arguments.__struct_fields__
    problems = []
    for name in given.keys() - set(known):
        nearest = difflib.get_close_matches(name, known, 1)
        problems.append(Problem(name, "unknown argument" + (f"; nearest: {nearest[0]}" if nearest else "")))
    if problems:
        raise ConfigInvalid(problems)
    try:
        asked = msgspec.convert(given, Arguments)
    except msgspec.ValidationError as wrong:
        raise ConfigInvalid([Problem("", str(wrong))]) from None
    if not 0 <= asked.min_replicas <= asked.max_replicas or asked.max_replicas < 1:
        bounds = f"min_replicas {asked.min_replicas}, max_replicas {asked.max_replicas}"
        raise ConfigInvalid([Problem("max_replicas", f"{bounds}: has to be at least 1, and at least min_replicas")])
    return asked
