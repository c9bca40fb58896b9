"""Entries of a checkpoint's quantisation settings, checked as they are read: they may hold anything."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightllmd.errors import ConfigInvalid, Problem, show

MOST_GROUP = 1 << 20


def refused(message: str) -> ConfigInvalid:
    """The error of a checkpoint whose quantisation can't be served."""
    return ConfigInvalid([Problem("model_dir", message)])


def whole(settings: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    """An integer by the first of `keys` that there is. Raises ConfigInvalid naming the key."""
    for key in keys:
        if settings.get(key) is not None:
            value = settings[key]
            if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= MOST_GROUP:
                raise refused(f"quantization_config.{key} is {show(value)}, an integer is needed")
            return value
    if default is None:
        raise refused(f"quantization_config.{keys[0]} is missing, an integer is needed")
    return default


def word(settings: Mapping[str, Any], *keys: str, default: str = "") -> str:
    """A name in lower case by the first of `keys` that there is. Raises ConfigInvalid naming the key."""
    for key in keys:
        if settings.get(key) is not None:
            value = settings[key]
            if not isinstance(value, str):
                raise refused(f"quantization_config.{key} is {show(value)}, a name is needed")
            return value.lower()
    return default


def switch(settings: Mapping[str, Any], key: str, default: bool) -> bool:
    """Raises ConfigInvalid naming the key."""
    value = settings.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise refused(f"quantization_config.{key} is {show(value)}, true or false is needed")
    return value


def names(settings: Mapping[str, Any], *keys: str) -> list[str]:
    """A list of names by the first of `keys` that there is, else an empty one. Raises ConfigInvalid naming the key."""
    for key in keys:
        if settings.get(key) is not None:
            value = settings[key]
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                raise refused(f"quantization_config.{key} is {show(value)}, a list of names is needed")
            return value
    return []


def table(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object, else an empty one. Raises ConfigInvalid naming the key."""
    value = settings.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise refused(f"quantization_config.{key} is {show(value)}, an object is needed")
    return value


def group_size(settings: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    """Inputs that share a scale; 0: all of a row, which formats write as -1. Raises ConfigInvalid naming the key."""
    value = whole(settings, *keys, default=default)
    if value == 0 or (value > 0 and value % 8):
        raise refused(f"quantization_config.{keys[0]} is {value}, -1 or a multiple of 8 is needed")
    return max(0, value)


def groups_in_words(group: int) -> str:
    """Behind a number of bits."""
    return f"groups of {group}" if group else "no groups"


def matches(pattern: str, text: str) -> bool:
    """At its beginning. Raises ConfigInvalid where it is no pattern."""
    try:
        return re.match(pattern, text) is not None
    except (re.error, RecursionError, OverflowError) as fault:
        raise refused(f"quantization_config: {show(pattern)} is no regular expression: {fault}") from None


def listed(module: str, patterns: Iterable[str]) -> bool:
    """Whether a list such as modules_to_not_convert names a module: itself or one around it, the end of its name, or
    a regular expression for the beginning."""
    return any(module.endswith(one) or f"{one}." in f"{module}." or _begins(one, module) for one in patterns if one)


def _begins(pattern: str, module: str) -> bool:
    try:
        return re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) is not None
    except re.error:  # it is a plain name
        return False
