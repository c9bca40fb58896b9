"""Verbs about the configuration: check, config."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import click

from lightllmctl.commands.options import json_option
from lightllmctl.context import CommandContext, pass_context
from lightllmd import console


@click.command()
@click.argument("file", type=click.Path(readable=False))
@json_option
@pass_context
def check(context: CommandContext, file: str, as_json: bool) -> None:
    """Check a configuration file.

    Needs no daemon. One problem a line; exit code 6 if there is one.
    """
    from lightllmd.config.load import load
    from lightllmd.errors import ConfigInvalid

    try:
        load(file)
    except ConfigInvalid as error:
        if as_json:
            context.echo_json({"api": 1, "file": file, "ok": False, "problems": error.parameters["problems"]})
        raise
    if as_json:
        context.echo_json({"api": 1, "file": file, "ok": True, "problems": []})
    else:
        console.say(f"{file}: no problems found")


@click.command()
@click.option("--effective", is_flag=True, help="What is in force, each derived value with its reason, and the memory.")
@json_option
@pass_context
def config(context: CommandContext, effective: bool, as_json: bool) -> None:
    """Show the configuration and what became of it.

    As TOML; with --effective as tables of what is in force.
    """
    answer = context.client.get("/v1/config", effective=1 if effective else None)
    if as_json:
        context.echo_json({"api": 1, **answer})
    elif effective:
        _print_effective(context, answer)
    else:
        console.say(to_toml(answer))


def _print_effective(context: CommandContext, answer: dict[str, Any]) -> None:
    from rich.text import Text

    from lightllmctl import units
    from lightllmctl.render import BAD, GOOD, clean, table

    derived = {entry.get("name"): entry for entry in answer.get("derived") or []}
    values = dict(answer.get("values") or {})
    values |= {name: entry.get("value") for name, entry in derived.items() if name not in values}
    written = (answer.get("config") or {}).get("params") or {}

    def reason(name: str, value: Any) -> str:
        if name in derived:
            return clean(derived[name].get("reason") or "")
        return "as configured" if name in written and written[name] == value else ""

    rows = [(clean(name), _toml_value(value), reason(name, value)) for name, value in values.items()]
    context.console.print(table(("SETTING", "VALUE", "REASON"), rows))

    budget = answer.get("budget") or {}
    parts = budget.get("rows") or []
    if not parts:
        return
    needed = answer.get("budget_needed") or sum(part.get("bytes", 0) for part in parts)
    available = budget.get("available") or 0
    memory: list[tuple[Text | str, ...]] = [
        (clean(part.get("name", "?")), units.size(part.get("bytes", 0)), clean(part.get("how", ""))) for part in parts
    ]
    fits = needed <= available
    verdict = Text(
        f"of {units.size(available)}; " + ("fits" if fits else f"{units.size(needed - available)} too much"),
        GOOD if fits else BAD,
    )
    memory.append(("total", units.size(needed), verdict))
    context.console.print("", table(("MEMORY", "BYTES", "HOW"), memory, right=(1,)), sep="\n")
    if devices := answer.get("devices") or []:
        lines = [
            (
                clean(place.get("device", "?")),
                str(place.get("replica", "?")),
                str(place.get("rank", "?")),
                units.size(place.get("free", 0)),
                f"{units.size(place.get('needed', 0))} of {units.size(place.get('available', 0))}",
            )
            for place in devices
        ]
        context.console.print(
            "", table(("DEVICE", "REPLICA", "RANK", "FREE", "PLANNED"), lines, right=(1, 2, 3)), sep="\n"
        )
    measured = [
        f"{clean(name.removeprefix('memory_')).replace('_', ' ')} {units.size(value)}"
        for name, value in (answer.get("measured") or {}).items()
    ]
    if measured:
        context.console.print("", f"measured: {', '.join(measured)}", sep="\n")


NO_SETTINGS = ("params", "top", "places", "held_keys", "warnings")  # of a Config, or said apart


def to_toml(config: dict[str, Any]) -> str:
    """The daemon's Config as the file that would say the same: parameters first, then the tables."""
    params = dict(config.get("params") or {})
    tables = {name: value for name, value in params.items() if isinstance(value, dict)}
    lines = _pairs({name: value for name, value in params.items() if name not in tables})
    tables |= {name: value for name, value in config.items() if name not in NO_SETTINGS}
    if models := tables.get("models"):
        tables["models"] = {name: _nested(entry) for name, entry in models.items()}
    for name, table in tables.items():
        _table(name, table, lines)
    return "\n".join(lines)


def _nested(entry: dict[str, Any]) -> dict[str, Any]:
    """A model's parameters, those of a table, such as quantise.rules, in that table."""
    made: dict[str, Any] = {}
    for key, value in entry.items():
        table, dot, name = key.rpartition(".")
        (made.setdefault(table, {}) if dot else made)[name] = value
    return made


def _table(name: str, table: Any, lines: list[str]) -> None:
    if not isinstance(table, dict):
        lines.extend(_pairs({name: table}))
        return
    inner = {key: value for key, value in table.items() if isinstance(value, dict)}
    own = {key: value for key, value in table.items() if key not in inner}
    if own:
        lines += ["", f"[{name}]", *_pairs(own)]
    for key, value in inner.items():
        _table(f"{name}.{_toml_key(key)}", value, lines)


def _pairs(table: dict[str, Any]) -> list[str]:
    return [
        f"# {key} is not set" if value is None else f"{_toml_key(key)} = {_toml_value(value)}"
        for key, value in table.items()
    ]


def _toml_key(key: str) -> str:
    """The name of a model may need quotes."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    """Of what JSON carries, TOML writes everything alike but null."""
    if value is None:
        return "-"
    text = json.dumps(value, ensure_ascii=False)
    if console.says_anything(sys.stdout):
        return text
    return re.sub(r"[^\x00-\x7f]", lambda found: console.escaped(found[0]), text)  # as a TOML string writes it, too


COMMANDS = (check, config)
