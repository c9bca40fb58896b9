"""The command line of `lightllmd`: every setting is a flag, and goes through the same checks as the file."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

from lightllmd import __version__, console
from lightllmd.config import reference
from lightllmd.config.diff import diff
from lightllmd.config.load import load, nearest_key, problem_at
from lightllmd.config.parameters import Config
from lightllmd.config.setting import Field, fields, tables
from lightllmd.errors import EXIT_OK, ConfigInvalid, Problem, show

DEFAULT_FILE = "/etc/lightllmd/lightllmd.toml"

Action = Literal["run", "check", "print-config", "json-schema", "feature-table"]
PRINTED: tuple[Action, ...] = ("print-config", "json-schema", "feature-table")


@dataclasses.dataclass(frozen=True)
class Invocation:
    """What a command line asks for."""

    config: Config
    config_file: str | None  # None: none was named, and the default one is not there
    action: Action = "run"
    # dotted key -> value: they override the file each time it is read
    flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    offline: bool = False  # a check looks at the file alone


def parse(argv: Sequence[str] | None = None) -> Invocation:
    """Reads the command line and the file that it names.

    Raises ConfigInvalid. Exits by itself on --help and --version (0) and on a flag that doesn't exist (2).
    """
    parser = _parser()
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse_unknown(parser, unknown)
    given = vars(options)
    for action in PRINTED:
        if given.get(action.replace("-", "_")):
            return Invocation(Config(), None, action)
    named, checked, offline = given.pop("config", None), given.pop("check", None), given.pop("offline", False)
    flags = {field.key: _value(field, given[field.key]) for field in fields(Config) if field.key in given}
    file = _choose_file(checked or named, flags)
    config = load(file, flags, None if offline else os.environ)
    return Invocation(config, file, "run" if checked is None else "check", flags, offline)


def reload(invocation: Invocation) -> Config:
    """What the same command line says now that the file may have changed.

    Raises ConfigInvalid, also where there is no file, or where it changes what only a new daemon can take up.
    """
    file = invocation.config_file
    if file is None:
        raise ConfigInvalid([Problem("", "there is no file to read again: lightllmd was started without one")])
    config = load(file, invocation.flags, os.environ)
    fixed = [change for change in diff(invocation.config, config) if change.reload == "restart"]
    if fixed:
        why = "can't be changed while lightllmd runs; restart it"
        problems = [problem_at(config, file, (one.key,), f"{show(one.old)} -> {show(one.new)} {why}") for one in fixed]
        raise ConfigInvalid(problems)
    return config


def _choose_file(named: str | None, flags: dict[str, Any]) -> str | None:
    if named is not None:
        return named
    if os.path.lexists(DEFAULT_FILE):
        return DEFAULT_FILE
    if "model_dir" in flags or "engine.backend" in flags:
        return None
    raise ConfigInvalid(
        [Problem("", "does not exist; name a file with --config FILE, or a model with --model_dir", DEFAULT_FILE)]
    )


# --- text -> values ------------------------------------------------------------------------------------------


def _value(field: Field, text: Any) -> Any:
    """The flag's text as the TOML value it stands for; text that is none is left for the checks to refuse."""
    if isinstance(text, list):
        if len(text) == 1 and text[0] in field.words:
            return text[0]
        return [_number(int, one) for one in text] if field.kind == "integers" else text
    if field.kind == "boolean":
        return {"true": True, "false": False}.get(text, text)
    if field.kind == "integer":
        return _number(int, text)
    return _number(float, text) if field.kind == "number" else text


def _number(kind: type[int] | type[float], text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        return text


# --- the parser ------------------------------------------------------------------------------------------------


_ACTIONS = "Files and actions"


def actions() -> list[argparse.Action]:
    """The flags that are no settings, for the manual page."""
    [group] = [group for group in _parser()._action_groups if group.title == _ACTIONS]
    return group._group_actions


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=8)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightllmd",
        usage="lightllmd [--config FILE] [--any-setting VALUE ...]",
        description="A supervised daemon that serves a large language model and loses no stream when its engine dies.",
        epilog="Flags override the file; the environment does not. Lists: --eos_id 2 7. Switches: "
        "--disable_log_stats, or --disable_log_stats=false over a file that says true. "
        "Exit codes: 0, 78 configuration, 69 no usable device, 71 address in use, 75 try again.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    actions = parser.add_argument_group(_ACTIONS)
    actions.add_argument("--config", metavar="FILE", help=f"the TOML file (default: {DEFAULT_FILE})")
    actions.add_argument(
        "--check",
        metavar="FILE",
        nargs="?",
        const="",
        help="only say what is wrong with the configuration, the model, the device and the host, as a start would: "
        "exit 0, or a start's exit code (78 for the file and the model) with one line per problem",
    )
    actions.add_argument("--offline", action="store_true", help="with --check: look at the file alone")
    actions.add_argument("--print-config", action="store_true", help="print a file with every setting commented")
    actions.add_argument("--json-schema", action="store_true", help="print the JSON schema of the file, for editors")
    actions.add_argument("--feature-table", action="store_true", help="print which features of generation go together")
    actions.add_argument("--version", action="version", version=f"lightllmd {__version__}")
    actions.add_argument("-h", "--help", action="help", help="show this")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in reference.grouped():
        title = field.setting.group or f"[{field.table}] {tables(Config)[field.table].rstrip('.')}"
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        _add(groups[title], field)
    return parser


def _add(group: argparse._ArgumentGroup, field: Field) -> None:
    said = f"{field.setting.doc} [{'; '.join(reference.facts(field))}]".replace("%", "%%")
    keywords: dict[str, Any] = {"dest": field.key, "help": said, "metavar": _metavar(field)}
    if field.kind == "boolean":
        keywords |= {"nargs": "?", "const": "true"}
    elif field.kind in ("integers", "strings"):
        keywords |= {"nargs": "*", "action": "extend"}
    group.add_argument(f"--{field.key}", **keywords)


def _metavar(field: Field) -> str:
    if field.choices:
        return "|".join(choice for choice in field.choices if choice)
    words = {
        "boolean": "true|false",
        "integer": "N",
        "number": "X",
        "string": "TEXT",
        "integers": "N",
        "strings": "TEXT",
    }
    return "|".join([*field.words, words[field.kind]])


def _refuse_unknown(parser: argparse.ArgumentParser, unknown: list[str]) -> NoReturn:
    flag = unknown[0].partition("=")[0]
    if not flag.startswith("-"):
        parser.error(f"unexpected argument: {flag}")
    close = nearest_key(flag.lstrip("-"))
    parser.error(f"unknown flag: {flag}" + (f"; nearest: --{close}" if close else ""))


# --- what needs no daemon -----------------------------------------------------------------------------------------


def finish(invocation: Invocation) -> int | None:
    """Does what needs no daemon and returns the exit code; None: the daemon is to run."""
    if invocation.action == "print-config":
        sys.stdout.write(reference.sample())
    elif invocation.action == "json-schema":
        sys.stdout.write(reference.schema_text())
    elif invocation.action == "feature-table":
        sys.stdout.write(reference.feature_table())
    elif invocation.action == "check":
        for warning in invocation.config.warnings:
            console.complain(f"warning: {warning}")
        console.say(f"{invocation.config_file or 'command line'}: valid")
    else:
        return None
    return EXIT_OK
