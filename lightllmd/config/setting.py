"""What can be said about one setting, and how the declaration is walked.

A setting is declared once, as an annotated struct field: its type, default and `Setting`. The command line, the
checks, the sample file, the JSON schema and the help text are all derived from the `Field`s that `fields()` yields.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import msgspec

Reload = Literal["live", "front end", "engine", "restart"]  # "restart": of the daemon; a reload refuses it
Kind = Literal["boolean", "integer", "number", "string", "integers", "strings"]


class _Same:
    """The documented page names the same default as ours."""

    def __repr__(self) -> str:
        return "SAME"


SAME = _Same()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is declared of one setting beside its type and default."""

    doc: str  # one paragraph
    unit: str = ""
    minimum: float | None = None  # of the number, or of each number of a list
    maximum: float | None = None
    above: float | None = None  # the number is greater than this
    pattern: str = ""  # a string, or each of a list, matches this entirely
    form: str = ""  # the pattern in words
    filled: bool = False  # the string or list is not empty
    pairs: bool = False  # a list of "key=value" that may be written as a table
    group: str = ""  # heading in --help; "" inside a table, whose own title is the heading
    page_default: Any = SAME  # what the documented parameter page says, where we default to something else
    reload: Reload = "engine"  # what has to be replaced for a new value to take effect
    example: str = ""  # TOML, shown in the sample file where the default says nothing


@dataclass(frozen=True)
class Field:
    """One setting with everything that is known about it."""

    key: str  # as in the file and, after "--", on the command line: "port", "http.workers"
    path: tuple[str, ...]  # attributes from Config: ("params", "port"), ("http", "workers")
    kind: Kind
    words: tuple[str, ...]  # strings allowed beside the kind ("auto")
    choices: tuple[str, ...]  # of kind "string": all that is allowed
    optional: bool  # None is allowed: not set
    default: Any
    setting: Setting

    @property
    def table(self) -> str:
        """ "" for the documented parameters, else "http", "engine.fake", …"""
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition(".")[2]

    @property
    def page_default(self) -> Any:
        """The default that LightLLM's parameter page names."""
        return self.default if self.setting.page_default is SAME else self.setting.page_default

    def of(self, config: Any) -> Any:
        """This setting's value in `config`."""
        for attribute in self.path:
            config = getattr(config, attribute)
        return config


def put(struct: Any, path: tuple[str, ...], value: Any) -> Any:
    """`struct` with another value of the attribute at `path`."""
    head, *rest = path
    inner = put(getattr(struct, head), tuple(rest), value) if rest else value
    return msgspec.structs.replace(struct, **{head: inner})


_KINDS: dict[Any, Kind] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list[int]: "integers",
    list[str]: "strings",
}


@cache
def fields(config_type: type[msgspec.Struct]) -> tuple[Field, ...]:
    """Every setting in the order of its declaration: the documented parameters, then the tables."""
    return tuple(_walk(config_type, ()))


@cache
def by_key(config_type: type[msgspec.Struct]) -> dict[str, Field]:
    """Every setting by its dotted key."""
    return {field.key: field for field in fields(config_type)}


@cache
def tables(config_type: type[msgspec.Struct]) -> dict[str, str]:
    """Name of each table -> its docstring."""
    return dict(_walk_tables(config_type, ()))


def _key(path: tuple[str, ...]) -> str:
    return ".".join(path[1:] if path[0] == "params" else path)


def _walk(struct: type[msgspec.Struct], path: tuple[str, ...]) -> Iterator[Field]:
    hints = typing.get_type_hints(struct, include_extras=True)
    for info in msgspec.structs.fields(struct):
        hint = hints[info.name]
        here = (*path, info.name)
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            yield from _walk(hint, here)
        elif typing.get_origin(hint) is typing.Annotated:
            declared, *extras = typing.get_args(hint)
            setting = next(extra for extra in extras if isinstance(extra, Setting))
            default = info.default if info.default is not msgspec.NODEFAULT else info.default_factory()
            yield Field(_key(here), here, *_shape(declared), default, setting)


def _walk_tables(struct: type[msgspec.Struct], path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name, hint in typing.get_type_hints(struct).items():
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            here = (*path, name)
            if name != "params":
                yield _key(here), hint.__doc__ or ""
            yield from _walk_tables(hint, here)


def _shape(declared: Any) -> tuple[Kind, tuple[str, ...], tuple[str, ...], bool]:
    """A declared type as (kind, words, choices, optional)."""
    union = typing.get_origin(declared) in (typing.Union, types.UnionType)
    parts = list(typing.get_args(declared)) if union else [declared]
    optional = type(None) in parts
    literals = [part for part in parts if typing.get_origin(part) is Literal]
    words = tuple(word for literal in literals for word in typing.get_args(literal))
    plain = [part for part in parts if part is not type(None) and part not in literals]
    if not plain:
        return "string", (), words, optional
    return _KINDS[plain[0]], words, (), optional
