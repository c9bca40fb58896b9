"""Entries of a Hugging Face config.json, checked as they are read: it may hold anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lightllmd.errors import ConfigInvalid, Problem, show

T = TypeVar("T", int, float)

# The largest sizes that are believed, well above any known model's: beyond them arithmetic and loops would not end.
MOST = {
    "num_hidden_layers": 4096,
    "hidden_size": 1 << 20,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 14,
    "intermediate_size": 1 << 32,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 31,
    "original_max_position_embeddings": 1 << 31,
    "sliding_window_pattern": 1 << 16,
    "mm_tokens_per_image": 1 << 16,
    "sliding_window": 1 << 31,
    "image_size": 1 << 14,
    "patch_size": 1 << 10,
    "num_channels": 3,
    "in_channels": 3,
    "embed_dim": 1 << 20,
    "out_hidden_size": 1 << 20,
    "num_heads": 1 << 16,
    "depth": 4096,
    "spatial_merge_size": 16,
    "temporal_patch_size": 16,
    "window_size": 1 << 14,
    "num_position_embeddings": 1 << 20,
}


def dimension(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A size: an integer from 1 to ``MOST[key]``. Raises ConfigInvalid naming the key where it is none."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST[key]:
        raise _wrong(key, value, f"an integer from 1 to {MOST[key]}")
    return value


def number(
    config: Mapping[str, Any], key: str, default: float | None = None, *, most: float = 1e18, within: str = ""
) -> float:
    """A positive finite number of the config, or of the table `within` it. Raises ConfigInvalid naming the key where it
    is none."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:  # NaN isn't either
        raise _wrong(f"{within}.{key}" if within else key, value, f"a positive number of at most {most:g}")
    return float(value)


def optional(
    read: Callable[[Mapping[str, Any], str, T], T], config: Mapping[str, Any], key: str, default: T
) -> T | None:
    """As `read` (`dimension` or `number`) has it, but None where the config says null, which means "none" there."""
    return None if key in config and config[key] is None else read(config, key, default)


def switch(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """Raises ConfigInvalid naming the key where it is neither true nor false."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise _wrong(key, value, "true or false")
    return value


def word(config: Mapping[str, Any], key: str) -> str | None:
    """A name. None where the config has none. Raises ConfigInvalid naming the key where it is something else."""
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise _wrong(key, value, "a name")
    return value


def table(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object inside the config; empty where it is missing. Raises ConfigInvalid where it is something else."""
    value = config.get(key)
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise _wrong(key, value, "an object")
    return value


def invalid(message: str) -> ConfigInvalid:
    """The error of a model that can't be served as its config says."""
    return ConfigInvalid([Problem("model_dir", message)])


class NotBuilt(ConfigInvalid):
    """A config that makes sense asks for what no family of ours computes."""


def not_built(message: str) -> NotBuilt:
    """As `invalid`, of a model that something else may compute."""
    return NotBuilt([Problem("model_dir", message)])


def _wrong(key: str, value: Any, wanted: str) -> ConfigInvalid:
    state = "missing" if value is None else show(value)
    return invalid(f"{key} is {state}, {wanted} is needed")
