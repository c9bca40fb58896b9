"""TOML file and command line -> Config. Finds every fault, not just the first, and says where it is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import tomli

from lightllmd.config import check, rules
from lightllmd.config.parameters import Config
from lightllmd.config.setting import by_key, fields, tables
from lightllmd.config.toml_lines import key_lines
from lightllmd.errors import ConfigInvalid, Problem

MAX_FILE_BYTES = 1 << 20
COMMAND_LINE = 0  # as a line number in Config.places


@dataclass(frozen=True)
class _Given:
    """One value as it was written. file None: on the command line."""

    value: Any
    file: str | None = None
    line: int | None = None
    element_lines: tuple[int | None, ...] = ()

    def problem(self, key: str, fault: check.Fault) -> Problem:
        line: int | None = self.line
        if fault.index is not None and fault.index < len(self.element_lines):
            line = self.element_lines[fault.index] or line
        return Problem(key, fault.message, self.file, line)


def load(file: str | None, flags: Mapping[str, Any] | None = None) -> Config:
    """The configuration of `file` (None: none), overridden by `flags` (dotted key -> value). Raises ConfigInvalid."""
    problems: list[Problem] = []
    given = _read(file, problems) if file is not None else {}
    values: dict[str, Any] = {}
    places: dict[str, int] = {}
    faulty: set[str] = set()
    overriding = {key: _Given(value) for key, value in (flags or {}).items()}
    for source in (given, overriding):
        for key, one in source.items():
            value, faults = check.check(by_key(Config)[key], one.value)
            problems += [one.problem(key, fault) for fault in faults]
            if faults:
                faulty.add(key)
                continue
            values[key] = value
            places[key] = one.line or COMMAND_LINE
    for key, value in values.items():
        one = overriding.get(key) or given[key]
        problems += [one.problem(key, fault) for fault in check.refusals(by_key(Config)[key], value)]
    config = _assemble(values, places)
    for keys, message in rules.contradictions(config, faulty):
        problems.append(problem_at(config, file, keys, message))
    problems += _missing(config, file, faulty)
    if problems:
        raise ConfigInvalid(sorted(problems, key=lambda problem: (problem.file is None, problem.line or 0)))
    return config


def problem_at(config: Config, file: str | None, keys: tuple[str, ...], message: str) -> Problem:
    """A problem of several keys, put where the last of them that was written stands."""
    for key in reversed(keys):
        if key in config.places:
            line = config.places[key]
            return Problem(key, message) if line == COMMAND_LINE else Problem(key, message, file, line)
    return Problem(keys[-1], message, file)


def _missing(config: Config, file: str | None, faulty: set[str]) -> Iterator[Problem]:
    """What has to be there: a model, and the files that the configuration names."""
    if config.params.model_dir is None and config.engine.backend != "fake" and "model_dir" not in faulty:
        yield Problem("model_dir", "is missing: which model shall be served?", file)
    path = config.http.api_keys_file
    if path and not os.access(path, os.R_OK):
        state = "can't be read" if os.path.exists(path) else "does not exist"
        yield problem_at(config, file, ("http.api_keys_file",), f"{check.show(path)} {state}")


def _assemble(values: Mapping[str, Any], places: dict[str, int]) -> Config:
    tree: dict[str, Any] = {"places": places}
    for field in fields(Config):
        if field.key in values:
            node = tree
            for attribute in field.path[:-1]:
                node = node.setdefault(attribute, {})
            node[field.path[-1]] = values[field.key]
    return msgspec.convert(tree, Config)


# --- the file -----------------------------------------------------------------------------------------------


def _read(file: str, problems: list[Problem]) -> dict[str, _Given]:
    """The settings that a file holds; what can't be understood goes to `problems`."""
    try:
        document, lines = _parse(file)
    except _Unreadable as unreadable:
        problems.append(Problem("", unreadable.message, file, unreadable.line))
        raise ConfigInvalid(problems) from None
    found: dict[str, _Given] = {}
    _collect(document, (), file, lines, found, problems)
    return found


class _Unreadable(Exception):
    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


def _parse(file: str) -> tuple[dict[str, Any], dict[tuple[str | int, ...], int]]:
    try:
        with Path(file).open("rb") as stream:
            body = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _Unreadable(f"can't be read: {error.strerror}") from None
    except ValueError as error:  # a NUL in the path
        raise _Unreadable(f"can't be read: {error}") from None
    if len(body) > MAX_FILE_BYTES:
        raise _Unreadable(f"is larger than {MAX_FILE_BYTES} bytes")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        line = body.count(b"\n", 0, error.start) + 1
        raise _Unreadable(f"byte 0x{body[error.start]:02x} is not valid UTF-8", line) from None
    try:
        return tomli.loads(text), key_lines(text)
    except RecursionError:
        raise _Unreadable("is nested too deeply") from None
    except ValueError as error:
        raise _syntax_error(str(error), text) from None


def _syntax_error(message: str, text: str) -> _Unreadable:
    """tomli's message, its position taken apart."""
    match = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    if match is None:
        return _Unreadable(f"TOML syntax: {message}")
    line = int(match[1]) if match[1] else max(1, len(text.splitlines()))
    return _Unreadable(f"TOML syntax: {message[: match.start()]}", line)


def _collect(
    table: dict[str, Any],
    path: tuple[str, ...],
    file: str,
    lines: dict[tuple[str | int, ...], int],
    found: dict[str, _Given],
    problems: list[Problem],
) -> None:
    """Walks one table of the document."""
    for name, value in table.items():
        here = (*path, name)
        key, line = ".".join(here), lines.get(here)
        if key in by_key(Config) and "." not in name:
            elements = tuple(lines.get((*here, n)) for n in range(len(value))) if isinstance(value, list) else ()
            found[key] = _Given(value, file, line, elements)
        elif key in tables(Config) and "." not in name:
            if isinstance(value, dict):
                _collect(value, here, file, lines, found, problems)
            else:
                message = f"{check.show(value)} is {check.kind_of(value)}, expected a table"
                problems.append(Problem(key, message, file, line))
        elif key == "models":
            problems += _models(value, file, lines)
        else:
            problems.append(Problem(key, _unknown(key, path, value), file, line))


def _models(value: Any, file: str, lines: dict[tuple[str | int, ...], int]) -> Iterator[Problem]:
    names = list(value) if isinstance(value, dict) else []
    for name in names:
        yield Problem(f"models.{name}", "is not available yet: named models", file, lines.get(("models", name)))
    if not names:
        yield Problem("models", "is not available yet: named models", file, lines.get(("models",)))


def _unknown(key: str, path: tuple[str, ...], value: Any) -> str:
    """Says what the unknown key may have been meant for."""
    table, _, name = key.rpartition(".")
    if isinstance(value, dict):
        siblings = {known.rpartition(".")[2]: known for known in tables(Config) if known.rpartition(".")[0] == table}
        close = siblings.get(check.nearest(name, siblings))
        return f"unknown table; nearest: [{close}]" if close else f"unknown table; known: {_listed(tables(Config))}"
    if path and name in by_key(Config):
        return f"unknown key; {name} is a top-level key: write it above the first [table]"
    return f"unknown key; nearest: {close}" if (close := nearest_key(key)) else "unknown key"


def nearest_key(key: str) -> str:
    """The likeliest key: a like name in the same table, that name in another table, a like name anywhere."""
    table, _, name = key.rpartition(".")
    siblings = {field.name: field.key for field in fields(Config) if field.table == table}
    if close := check.nearest(name, siblings):
        return siblings[close]
    elsewhere = {field.name: field.key for field in reversed(fields(Config))}
    return elsewhere.get(check.nearest(name, elsewhere), "")


def _listed(names: Mapping[str, str]) -> str:
    return ", ".join(f"[{name}]" for name in names)
