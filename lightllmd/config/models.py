"""Named models: the tables [models.NAME], and the configuration that serves one of them.

An entry holds `model_dir` and any other parameter that belongs to a model; they stand over the top of the file and over
the command line. `with_model`, `with_path` and `choose` take the configuration as it was loaded, never one that they
made: what one model overrides says nothing about the next.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

import msgspec

from lightllmd.config import check, rules
from lightllmd.config.document import Document, Given
from lightllmd.config.parameters import Config, Params
from lightllmd.config.setting import Field, by_key, fields, put
from lightllmd.errors import NoSuchModel, Problem, show

TABLE = "models"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
NAME_FORM = "letters, digits, '.', '_' and '-', beginning with a letter or a digit, at most 128"
TOP = "the model at the top"  # no NAME: it has spaces
DOC = (
    "A table [models.NAME] makes a model known by that name: lightllmctl swap NAME brings it into service. What it "
    "says stands over the top of the file and over flags while it serves. The model at the top is served first, as the "
    "top says; it is known by the name of a table that has its model_dir and says nothing else than the top."
)

Overrides = dict[str, Any]  # checked values by parameter; model_dir is among them


def allowed() -> tuple[Field, ...]:
    """What an entry may hold: the parameters that a new engine takes up."""
    return tuple(field for field in fields(Config) if field.path[0] == "params" and field.setting.reload == "engine")


def place(name: str, key: str) -> str:
    """Where `Config.places` has the line of a value of an entry."""
    return f"{TABLE}.{name}.{key}"


# --- reading --------------------------------------------------------------------------------------------------


def read(document: Document, problems: list[Problem]) -> dict[str, dict[str, Given]]:
    """The entries as written; names and keys that can't be go to `problems`."""
    tables = document.tree.get(TABLE, {})
    if not isinstance(tables, dict):
        problems.append(document.problem((TABLE,), f"{check.said(tables)}, expected tables [models.NAME]"))
        return {}
    found: dict[str, dict[str, Given]] = {}
    for name, table in tables.items():
        here = (TABLE, name)
        if not isinstance(table, dict):
            problems.append(document.problem(here, f"{check.said(table)}, expected a table [models.NAME]"))
        elif not re.fullmatch(NAME, name):
            problems.append(document.problem(here, f"{show(name)} is no name of a model: {NAME_FORM}"))
        else:
            if "model_dir" not in table:
                problems.append(document.problem(here, "has no model_dir: which model is it?"))
            found[name] = dict(_entry(document, name, table, problems))
    return found


def _entry(
    document: Document, name: str, table: dict[str, Any], problems: list[Problem]
) -> Iterator[tuple[str, Given]]:
    known = [field.key for field in allowed()]
    inner = {key.partition(".")[0] for key in known if "." in key}
    for key, value in table.items():
        here = (TABLE, name, key)
        if key in inner and isinstance(value, dict):
            for part, held in value.items():
                if f"{key}.{part}" in known and "." not in part:
                    yield f"{key}.{part}", document.given((*here, part), held)
                else:
                    problems.append(document.problem((*here, part), _refused(f"{key}.{part}", held, known)))
        elif key in known and "." not in key:
            yield key, document.given(here, value)
        elif key in inner:
            problems.append(document.problem(here, f"{check.said(value)}, expected a table"))
        else:
            problems.append(document.problem(here, _refused(key, value, known)))


def _refused(key: str, value: Any, known: Iterable[str]) -> str:
    field = by_key(Config).get(key)
    if field is not None and not field.table:
        return f"is no parameter of a model (reload: {field.setting.reload}); write it above the first [table]"
    if isinstance(value, dict):
        return "is a table; what a model overrides stands in [models.NAME] itself"
    close = check.nearest(key, known)
    return f"unknown key; nearest: {close}" if close else f"unknown key; known: {', '.join(known)}"


def settle(
    entries: Mapping[str, Mapping[str, Given]], places: dict[str, int], problems: list[Problem]
) -> tuple[dict[str, Overrides], dict[str, set[str]]]:
    """The checked values of each entry, their lines added to `places`; and the keys of each that are faulty."""
    models: dict[str, Overrides] = {}
    faulty: dict[str, set[str]] = {}
    for name, entry in entries.items():
        models[name], faulty[name] = {}, set()
        for key, given in entry.items():
            field = by_key(Config)[key]
            value, faults = check.check(field, given.value)
            problems += [given.problem(place(name, key), fault) for fault in faults or check.refusals(field, value)]
            if faults:
                faulty[name].add(key)
                continue
            models[name][key] = value
            places[place(name, key)] = given.line or 0
    return models, faulty


def contradictions(config: Config, faulty: set[str], faulty_of: Mapping[str, set[str]], file: str) -> Iterator[Problem]:
    """What an entry's values break together with the top of the file. `faulty`: keys of no known value, there."""
    for name, entry in config.models.items():
        unknown = (faulty - set(entry)) | faulty_of[name]
        for keys, message in rules.contradictions(with_model(config, name), unknown):
            own = [key for key in keys if key in entry]
            if own:  # else it is the top of the file that is wrong, and it says so itself
                key = place(name, own[-1])
                yield Problem(key, message, file, config.places.get(key))
    named = config.http.served_model_name
    if named in config.models and config.params.model_dir is not None and not faulty | faulty_of[named]:
        others = [key for key, value in config.models[named].items() if not _says(config.params, key, value)]
        if others:
            key = "http.served_model_name"
            message = f"{show(named)} is the name of [{TABLE}.{named}], which has another {', '.join(others)}"
            yield Problem(key, message, file, config.places.get(key))


# --- choosing -------------------------------------------------------------------------------------------------


def with_model(config: Config, name: str) -> Config:
    """The configuration that serves [models.`name`], under that name. Raises NoSuchModel."""
    if name not in config.models:
        raise no_such_model(config, name)
    entry = config.models[name]
    places = dict(config.places)
    for key in entry:
        _move(places, key, config.places.get(place(name, key)))
    _move(places, "http.served_model_name", config.places.get(place(name, "model_dir")))
    return msgspec.structs.replace(
        config,
        params=_overridden(config.params, entry),
        top=config.params,
        http=msgspec.structs.replace(config.http, served_model_name=name),
        places=places,
    )


def with_path(config: Config, path: str) -> Config:
    """The configuration that serves the model at `path`, under the name that the path gives it."""
    places = {**config.places, "model_dir": 0}
    places.pop("http.served_model_name", None)
    return msgspec.structs.replace(
        config,
        params=msgspec.structs.replace(config.params, model_dir=path),
        top=config.params,
        http=msgspec.structs.replace(config.http, served_model_name=""),
        places=places,
    )


def _move(places: dict[str, int], key: str, line: int | None) -> None:
    if line is None:
        places.pop(key, None)
    else:
        places[key] = line


def choose(config: Config, text: str) -> Config:
    """`text` as an operator writes it: a name of [models], name or path of the model at the top, else a path. Raises
    NoSuchModel where it is none of these."""
    if text in config.models:
        return with_model(config, text)
    own = config.params.model_dir
    if own is not None and text and (text == config.http.served_model_name or _plain(text) == _plain(own)):
        return at_top(config)
    if "/" in text or text.startswith("package:") or os.path.exists(text):
        return with_path(config, text)
    raise no_such_model(config, text)


def no_such_model(config: Config, text: str) -> NoSuchModel:
    """The error for `text`, with the names that there are and the nearest one."""
    names = list(config.models)
    known = f"[models] has {', '.join(names)}" if names else "the configuration has no [models]"
    close = check.nearest(text, names)
    hint = f"; nearest: {close}" if close else ""
    return NoSuchModel(f"no model {show(text)}: {known}{hint}", model=text, candidates=names)


def at_top(config: Config) -> Config:
    """The configuration that serves the model at the top, under the name of its entry where it has one."""
    name = name_of(config)
    return config if name is None or config.http.served_model_name else with_model(config, name)


def name_of(config: Config) -> str | None:
    """The entry that the configuration serves: one that says nothing but what is in force. The one of the name that
    is given, else the first."""
    if config.params.model_dir is None:
        return None
    alike = [
        name
        for name, entry in config.models.items()
        if all(_says(config.params, key, value) for key, value in entry.items())
    ]
    given = config.http.served_model_name
    return given if given in alike else next(iter(alike), None)


def others(config: Config) -> dict[str, Params]:
    """The parameters of every model that a swap by name may put in the place of the one that `config` serves; with
    [models] the one at the top of the file too, as TOP, which the named ones take the place of.

    Unlike `with_model` it takes a configuration of any making.
    """
    top, served = config.top or config.params, name_of(config)
    found = {name: _overridden(top, entry) for name, entry in config.models.items() if name != served}
    if config.models and not any(_same(top, one) for one in (config.params, *found.values())):
        found[TOP] = top
    return found


def _plain(model_dir: str) -> str:
    """Without what makes two spellings of one path differ."""
    return model_dir if model_dir.startswith("package:") else str(PurePath(model_dir))


def _says(params: Params, key: str, value: Any) -> bool:
    """Whether that value of an entry changes nothing."""
    if key == "model_dir":
        return params.model_dir is not None and _plain(params.model_dir) == _plain(str(value))
    return _overridden(params, {key: value}) == params


def _same(top: Params, other: Params) -> bool:
    """Whether an engine that serves `other` serves `top`, which may name no model."""
    if top.model_dir is None:
        return True
    return _says(top, "model_dir", other.model_dir) and msgspec.structs.replace(top, model_dir=other.model_dir) == other


def _overridden(params: Params, entry: Mapping[str, Any]) -> Params:
    for key, value in entry.items():
        params = put(params, by_key(Config)[key].path[1:], value)
    return params
