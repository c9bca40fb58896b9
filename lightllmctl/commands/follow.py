"""Verbs that read streams: logs, events."""

from __future__ import annotations

import sys
from typing import Any

import click

from lightllmctl.commands.options import complete_worker, json_option
from lightllmctl.context import CommandContext, pass_context
from lightllmd import console

lines_option = click.option(
    "-n",
    "--lines",
    type=click.IntRange(0, 1_000_000),
    default=50,
    show_default=True,
    help="How many of the last ones.",
)


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what is logged from now on, until ^C.")
@lines_option
@json_option
@click.argument("worker", required=False, shell_complete=complete_worker)
@pass_context
def logs(context: CommandContext, follow: bool, lines: int, as_json: bool, worker: str | None) -> None:
    """What the daemon and its workers logged. WORKER: as list-workers names it, or lightllmd."""
    from lightllmctl.render import log_line

    _print_stream(context, "/v1/logs", log_line, as_json, follow=int(follow), lines=lines, worker=worker)


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens from now on, until ^C.")
@lines_option
@json_option
@pass_context
def events(context: CommandContext, follow: bool, lines: int, as_json: bool) -> None:
    """What happened: starts, deaths, restarts, jobs."""
    from lightllmctl.render import event_line

    _print_stream(context, "/v1/events", event_line, as_json, follow=int(follow), lines=lines)


def _print_stream(context: CommandContext, path: str, render: Any, as_json: bool, **query: Any) -> None:
    for entry in context.client.stream(path, **query):
        if as_json:
            console.say(console.literal(entry))
        else:
            context.console.print(render(entry))
        sys.stdout.flush()


COMMANDS = (logs, events)
