"""Is this value one that the setting takes? Each answer names the value and the bound."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from lightllmd.config import layer_rules
from lightllmd.config.modes import GROUP, GROUPS, MODES, NAMES, REFUSED, canonical, group_fault
from lightllmd.config.setting import Field
from lightllmd.errors import show

_KIND_WORDS = {
    "boolean": "true or false",
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "integers": "a list of integers",
    "strings": "a list of strings",
}


class Fault(Exception):
    """What is wrong with a value; `index` names the element of a list."""

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.index = index


def expected(field: Field) -> str:
    """What may stand there, in words: '"auto" or an integer'."""
    if field.choices:
        return " | ".join(f'"{choice}"' for choice in field.choices)
    return " or ".join([*(f'"{word}"' for word in field.words), _KIND_WORDS[field.kind]])


def bounds(field: Field) -> str:
    """'1 … 65535', '> 0', 'at least 1', or nothing."""
    low, high, above = field.setting.minimum, field.setting.maximum, field.setting.above
    if above is not None:
        return f"> {above:g}" + (f", at most {_number(high)}" if high is not None else "")
    if low is not None and high is not None:
        return f"{_number(low)} … {_number(high)}"
    if low is not None:
        return f"at least {_number(low)}"
    return f"at most {_number(high)}" if high is not None else ""


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)


def kind_of(value: Any) -> str:
    """The type of a TOML value in words."""
    for kind, word in (
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a number"),
        (str, "a string"),
        (list, "a list"),
        (dict, "a table"),
    ):
        if isinstance(value, kind):
            return word
    return "a date or time"


def said(value: Any) -> str:
    """'"8000" is a string'."""
    return f"{show(value)} is {kind_of(value)}"


_LONGEST_TEXT = 4096  # bytes of a string, as of a path
_LONGEST_NAME = 256  # characters of what may have been meant for a name


def nearest(name: str, names: Iterable[str]) -> str:
    """The likeliest meant name, or nothing."""
    if len(name) > _LONGEST_NAME:
        return ""  # comparing takes time by the square of the length
    plain = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), plain, n=1, cutoff=0.6)
    return plain[close[0]] if close else ""


def check(field: Field, value: Any) -> tuple[Any, list[Fault]]:
    """The value in its declared type, and everything that is wrong with it."""
    setting = field.setting
    says_none = value == "None" and (field.choices or field.kind != "string")
    if field.optional and (value is None or says_none):
        return None, []
    if isinstance(value, str) and value in field.words:
        return value, []
    if setting.pairs and isinstance(value, dict):
        value = [f"{key}={inner}" if isinstance(inner, str) else inner for key, inner in value.items()]
    try:
        if field.kind not in ("integers", "strings"):
            return _scalar(field, field.kind, value), []
        if not isinstance(value, list):
            raise _wrong_kind(field, value)
        if setting.filled and not value:
            raise Fault("is empty; it needs at least one element")
    except Fault as fault:
        return None, [fault]
    checked, faults = [], []
    for index, element in enumerate(value):
        try:
            checked.append(_scalar(field, field.kind.removesuffix("s"), element))
        except Fault as fault:
            faults.append(Fault(fault.message, index))
    return checked, faults


def _wrong_kind(field: Field, value: Any, kind: str | None = None) -> Fault:
    wanted = _KIND_WORDS[kind] if kind else expected(field)
    hint = ""
    if field.kind == "boolean" and value in ("true", "false", "True", "False"):
        hint = f"; write {str(value).lower()} without quotes"
    elif isinstance(value, str) and field.words and (word := nearest(value, field.words)):
        hint = f'; nearest: "{word}"'
    return Fault(f"{said(value)}, expected {wanted}{hint}")


def _scalar(field: Field, kind: str, value: Any) -> Any:
    if kind == "boolean":
        if not isinstance(value, bool):
            raise _wrong_kind(field, value)
        return value
    if kind == "string":
        return _string(field, value)
    number = (int, float) if kind == "number" else int
    if isinstance(value, bool) or not isinstance(value, number):
        raise _wrong_kind(field, value, kind if field.kind != kind else None)
    if isinstance(value, float) and not math.isfinite(value):
        raise Fault(f"{value} is no finite number")
    setting = field.setting
    low, high, above = setting.minimum, setting.maximum, setting.above
    outside = (low is not None and value < low) or (high is not None and value > high)
    if outside or (above is not None and value <= above):
        unit = f" {setting.unit}" if setting.unit else ""
        raise Fault(f"{show(value)} is out of bounds: {bounds(field)}{unit}")
    return float(value) if kind == "number" else value


def _string(field: Field, value: Any) -> str:
    setting = field.setting
    if not isinstance(value, str):
        raise _wrong_kind(field, value, "string" if field.kind == "strings" else None)
    if field.choices:
        if value not in field.choices:
            close = nearest(value, field.choices)
            hint = f'; nearest: "{close}"' if close else ""
            raise Fault(f"{show(value)} is not one of {expected(field)}{hint}")
        return value
    if len(value.encode(errors="surrogateescape")) > _LONGEST_TEXT:
        raise Fault(f"{show(value)} is longer than {_LONGEST_TEXT} bytes")
    if setting.filled and not value:
        raise Fault("is empty")
    if "\0" in value:
        raise Fault(f"{show(value)} contains a NUL character")
    if setting.pattern and not re.fullmatch(setting.pattern, value):
        raise Fault(f"{show(value)} is not {setting.form}")
    return value


def refusals(field: Field, value: Any) -> list[Fault]:
    """Why a value of the right form can't be had: what it names is unknown, or not built."""
    if field.key == "mode":
        return [Fault(said, index) for index, name in enumerate(value) if (said := mode_fault(name))]
    if field.key == "quantise.rules":
        return [Fault(said, index) for index, text in enumerate(value) if (said := _said_by(layer_rules.rule, text))]
    if field.key == "quantise.mixdown":
        return [Fault(said)] if (said := _said_by(layer_rules.layers, value)) else []
    return []


def _said_by(read: Callable[[str], Any], text: str) -> str:
    try:
        read(text)
    except layer_rules.NoRule as fault:
        return str(fault)
    return ""


def mode_fault(name: str) -> str:
    """Why it is no mode, or none that is built; else nothing."""
    if group := GROUP.fullmatch(name):
        return "" if int(group[1]) in GROUPS else f"{show(name)}: {group_fault()}"
    if name in REFUSED:
        return f"{show(name)} is not available: {REFUSED[name]}"
    if canonical(name) in MODES:
        return ""
    close = nearest(name, NAMES)
    hint = f'nearest: "{close}"' if close else f"known: {', '.join(NAMES)}, and gN"
    return f"{show(name)} is no known mode; {hint}"
