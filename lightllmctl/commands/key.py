"""Verbs about API keys: key add, key list, key revoke. They work on the file; a reload puts it in force."""

from __future__ import annotations

import os
import re
import time
from datetime import datetime
from typing import Any

import click

from lightllmctl.commands.group import VerbGroup
from lightllmctl.commands.options import Duration, Number, json_option
from lightllmctl.context import CommandContext, pass_context
from lightllmd import console
from lightllmd.errors import CTL_USAGE, ControlError, DaemonNotRunning, Usage


class _Moment(click.ParamType):
    """Unix seconds, from a moment with its time zone or a time from now."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        if not re.match(r"\d{4}-\d\d-\d\d", text):
            return time.time() + Duration().convert(text, param, ctx)
        try:
            when = datetime.fromisoformat(text)
        except ValueError as wrong:
            self.fail(f"{text[:40]!r} is no moment: {wrong}", param, ctx)
        if when.tzinfo is None:
            self.fail(f"{text[:40]!r} has no time zone: write 2027-01-01T00:00:00Z, or a time from now such as 90d")
        if when.timestamp() <= time.time():
            self.fail(f"{text[:40]!r} is past", param, ctx)
        return when.timestamp()


file_option = click.option(
    "--file",
    type=click.Path(readable=False),
    metavar="PATH",
    help="The file of keys. Default: [http] api_keys_file of the daemon that runs, else of the default configuration.",
)
reload_option = click.option(
    "--reload", "and_reload", is_flag=True, help="Put it in force at once, as lightllmctl reload."
)


@click.group(cls=VerbGroup, invoke_without_command=True)
@click.pass_context
def key(context: click.Context) -> int:
    """Make, list and revoke API keys.

    The file holds hashes. A key is printed once, when it is made.
    """
    if context.invoked_subcommand is None:
        console.complain(context.get_help())
    return CTL_USAGE


@key.command()
@click.argument("name")
@click.option("--expires", type=_Moment(), metavar="WHEN", help="2027-01-01T00:00:00Z, or a time from now: 90d.")
@click.option("--admin", is_flag=True, help="It opens /metrics and /docs, too.")
@click.option("--requests-per-minute", type=click.IntRange(1, 10**9), metavar="N", help="At most so many requests.")
@click.option(
    "--tokens-per-minute", type=click.IntRange(1, 10**12), metavar="N", help="Of prompts and answers together."
)
@click.option("--max-concurrent", type=click.IntRange(1, 10**6), metavar="N", help="Requests at a time.")
@click.option("--weight", type=Number(0, 1000, min_open=True), metavar="X", help="Share of the engine; others have 1.")
@click.option(
    "--priority",
    type=click.IntRange(-100, 100),
    metavar="N",
    help="The most urgent priority that its requests may have; less is sooner.",
)
@file_option
@reload_option
@pass_context
def add(
    context: CommandContext,
    name: str,
    file: str | None,
    and_reload: bool,
    **fields: Any,
) -> None:
    """Make a key and print it, this once.

    It stands alone on standard output. Exit code 6 where there is a key of that name, or the file is not valid.
    """
    from lightllmd.config import key_editing
    from lightllmd.config.keys import NAME, NAME_FORM, ApiKey, hashed

    if not re.fullmatch(NAME, name):
        raise Usage(f"{name[:80]!r} is no name of a key: {NAME_FORM}")
    path = _path(context, file)
    secret = key_editing.new_key()
    given = {field: value for field, value in fields.items() if value is not None}
    key_editing.add(path, ApiKey(name=name, sha256=hashed(secret), **given))
    console.say(secret)
    _in_force(context, path, and_reload)


@key.command(name="list")
@file_option
@json_option
@pass_context
def list_(context: CommandContext, file: str | None, as_json: bool) -> None:
    """Show the names, limits and expiry of the keys in the file."""
    from lightllmctl.render import table
    from lightllmd.config import key_editing

    known = key_editing.read(_path(context, file))
    now = time.time()
    if as_json:
        entries = [
            {
                "name": one.name,
                "expires": one.expires,
                "expired": one.expires is not None and one.expires <= now,
                "admin": one.admin,
                "requests_per_minute": one.requests_per_minute,
                "tokens_per_minute": one.tokens_per_minute,
                "max_concurrent": one.max_concurrent,
                "weight": one.weight,
                "priority": one.priority,
            }
            for one in known
        ]
        context.echo_json({"api": 1, "keys": entries})
        return

    def expiry(when: float | None) -> str:
        if when is None:
            return "never"
        return key_editing.moment(when) + (" (expired)" if when <= now else "")

    def limit(value: int) -> str:
        return f"{value:,}" if value else "-"

    rows = [
        (
            one.name,
            expiry(one.expires),
            "yes" if one.admin else "no",
            limit(one.requests_per_minute),
            limit(one.tokens_per_minute),
            limit(one.max_concurrent),
            f"{one.weight:g}",
            str(one.priority),
        )
        for one in known
    ]
    heads = ("NAME", "EXPIRES", "ADMIN", "REQUESTS/MIN", "TOKENS/MIN", "CONCURRENT", "WEIGHT", "PRIORITY")
    context.console.print(table(heads, rows, right=(3, 4, 5, 6, 7)))


@key.command()
@click.argument("name")
@file_option
@reload_option
@pass_context
def revoke(context: CommandContext, name: str, file: str | None, and_reload: bool) -> None:
    """Take a key out of the file."""
    from lightllmd.config import key_editing

    path = _path(context, file)
    key_editing.revoke(path, name)
    _in_force(context, path, and_reload)


def _in_force(context: CommandContext, path: str, and_reload: bool) -> None:
    from lightllmctl import jobs

    if and_reload:
        jobs.run(context, "reload", {}, False, None)
    else:
        console.complain(f"{path} is changed; a running daemon takes it up within seconds")


def _path(context: CommandContext, named: str | None) -> str:
    if named is not None:
        return os.path.abspath(named)
    try:
        config = context.client.get("/v1/config")
    except DaemonNotRunning:
        from lightllmd.config.cli import DEFAULT_FILE
        from lightllmd.config.document import Unreadable, parse

        try:
            config = parse(DEFAULT_FILE).tree
        except Unreadable as failure:
            raise ControlError(f"which file? No daemon answers, and {DEFAULT_FILE} {failure.message}: --file") from None
    path = (config.get("http") or {}).get("api_keys_file")
    if not path or not isinstance(path, str):
        raise ControlError("the configuration has no [http] api_keys_file: set it, or name a file by --file PATH")
    if not os.path.isabs(path):
        raise ControlError(
            f"[http] api_keys_file = {path!r} is relative to the daemon's folder: name it by --file PATH"
        )
    return path


COMMANDS = (key,)
