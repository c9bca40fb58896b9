"""TOML file and command line -> Config. Finds every fault, not just the first, and says where it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from lightllmd.config import check, models, push, rules, tls
from lightllmd.config.document import Document, Given, Unreadable, parse
from lightllmd.config.keys import ApiKey, KeysInvalid, exposed, ring
from lightllmd.config.keys import read as read_keys
from lightllmd.config.parameters import Config
from lightllmd.config.setting import by_key, fields, tables
from lightllmd.errors import ConfigInvalid, Problem

COMMAND_LINE = 0  # as a line number in Config.places


def load(
    file: str | None, flags: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None
) -> Config:
    """The configuration of `file` (None: none), overridden by `flags` (dotted key -> value). `environment`: has to hold
    what the configuration takes from it; None: that is not looked at. Raises ConfigInvalid."""
    document = _read(file) if file is not None else Document("", {}, {})
    problems: list[Problem] = []
    given = dict(_collect(document, document.tree, (), problems))
    entries = models.read(document, problems)
    values: dict[str, Any] = {}
    places: dict[str, int] = {}
    faulty: set[str] = set()
    overriding = {key: Given(value) for key, value in (flags or {}).items()}
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
    named, faulty_named = models.settle(entries, places, problems)
    config = _assemble(values, named, places)
    for keys, message in rules.contradictions(config, faulty):
        problems.append(problem_at(config, file, keys, message))
    problems += models.contradictions(config, faulty, faulty_named, document.file)
    problems += _missing(config, file, faulty)
    config = _with_keys(config, file, problems)
    config = _with_tls(config, file, problems)
    if environment is not None and config.params.enable_monitor_auth:
        problems += _unauthorized(config, file, environment)
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
    """What has to be there."""
    if config.params.model_dir is None and config.engine.backend != "fake" and "model_dir" not in faulty:
        yield Problem("model_dir", "is missing: which model shall be served?", file)


def _unauthorized(config: Config, file: str | None, environment: Mapping[str, str]) -> Iterator[Problem]:
    try:
        push.credentials(environment)
    except ValueError as fault:
        yield problem_at(config, file, ("enable_monitor_auth",), f"true: {fault}")


def _with_keys(config: Config, file: str | None, problems: list[Problem]) -> Config:
    """With what the key files hold."""
    found: dict[str, list[ApiKey]] = {}
    warnings = []
    for setting, path in config.http.key_files.items():
        try:
            found[setting] = read_keys(path)
        except KeysInvalid as fault:
            problems += fault.problems or [problem_at(config, file, (setting,), fault.message)]
        if warning := exposed(path):
            warnings.append(f"{setting}: {warning}")
        if setting in found and not found[setting]:
            warnings.append(f"{setting}: {path} has no key yet, so that no client may enter")
    held = ring(found.get("http.api_keys_file"), found.get("http.metrics_key"), config.http.metrics_key)
    return msgspec.structs.replace(config, held_keys=held, warnings=warnings)


def _with_tls(config: Config, file: str | None, problems: list[Problem]) -> Config:
    """With what is unwise about the files of TLS; what makes them useless goes to `problems`."""
    certificate, key, client_ca = config.http.tls_files
    if not (certificate and key):
        return config
    try:
        pair = tls.read(certificate, key, client_ca)
    except tls.TlsInvalid as fault:
        problems.append(problem_at(config, file, (fault.setting,), fault.message))
        return config
    said = [f"{setting}: {message}" for setting, message in tls.unwise(pair, key)]
    return msgspec.structs.replace(config, warnings=[*config.warnings, *said])


def _assemble(values: Mapping[str, Any], named: Mapping[str, models.Overrides], places: dict[str, int]) -> Config:
    tree: dict[str, Any] = {models.TABLE: named, "places": places}
    for field in fields(Config):
        if field.key in values:
            node = tree
            for attribute in field.path[:-1]:
                node = node.setdefault(attribute, {})
            node[field.path[-1]] = values[field.key]
    return msgspec.convert(tree, Config)


# --- the file -----------------------------------------------------------------------------------------------


def _read(file: str) -> Document:
    try:
        return parse(file)
    except Unreadable as unreadable:
        raise ConfigInvalid([Problem("", unreadable.message, file, unreadable.line)]) from None


def _collect(
    document: Document, table: dict[str, Any], path: tuple[str, ...], problems: list[Problem]
) -> Iterator[tuple[str, Given]]:
    """The settings of one table of the document and of those in it; what can't be understood goes to `problems`."""
    for name, value in table.items():
        here = (*path, name)
        key = ".".join(here)
        if key in by_key(Config) and "." not in name:
            yield key, document.given(here, value)
        elif key in tables(Config) and "." not in name:
            if isinstance(value, dict):
                yield from _collect(document, value, here, problems)
            else:
                problems.append(document.problem(here, f"{check.said(value)}, expected a table"))
        elif here != (models.TABLE,):
            problems.append(document.problem(here, _unknown(key, path, value)))


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
