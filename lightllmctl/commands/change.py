"""Verbs that change what is served: reload, swap. Each is a job of the daemon."""

from __future__ import annotations

import os
from typing import Any

import click

from lightllmctl.commands.options import Duration, complete_model, waiting_options
from lightllmctl.context import CommandContext, pass_context
from lightllmd import console
from lightllmd.errors import JobFailed


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would change, and how.")
@waiting_options
@pass_context
def reload(context: CommandContext, dry_run: bool, no_block: bool, timeout: float | None) -> None:
    """Read the configuration again and put what changed in force, without dropping a request.

    Returns when all is in force, or when nothing is: 6 the file is bad, 8 it doesn't fit, 9 it failed on the way and
    was rolled back.
    """
    from lightllmctl import jobs

    job = jobs.run(context, "reload", {"dry_run": True} if dry_run else {}, no_block, timeout)
    if job is not None and dry_run:
        _print_changes(context, job.get("details") or {})


def _print_changes(context: CommandContext, details: dict[str, Any]) -> None:
    """What a reload would change and, where that takes a new engine, whether and how it fits."""
    from lightllmctl.render import clean, table

    rows = [
        (clean(change.get("key", "?")), _value(change.get("old")), _value(change.get("new")), str(change.get("reload")))
        for change in details.get("changes") or []
    ]
    if rows:
        context.console.print(table(("SETTING", "IN FORCE", "IN THE FILE", "CLASS"), rows))
    if plan := details.get("plan"):
        context.console.print("", _lines(plan), sep="\n")


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.option("--plan", is_flag=True, help="Only say whether and how it fits; exit code 8 if it doesn't.")
@click.option(
    "--drain",
    type=Duration(zero=True),
    metavar="TIME",
    help="How long requests on the old model may take. When it is over: with --force they are ended, else a swap that "
    "needs their memory is given up. Default: as long as they take.",
)
@click.option("--force", is_flag=True, help="With --drain: end the requests that take longer.")
@click.option(
    "--on-failure",
    type=click.Choice(["rollback", "keep"]),
    default="rollback",
    show_default=True,
    help="keep: the new model stays in force and is tried again as any worker that dies.",
)
@waiting_options
@pass_context
def swap(
    context: CommandContext,
    model: str,
    plan: bool,
    drain: float | None,
    force: bool,
    on_failure: str,
    no_block: bool,
    timeout: float | None,
) -> None:
    """Serve MODEL instead: a name of [models], or a path.

    Requests in flight finish on the old model, new ones wait or go to the new one once it has produced a token. A swap
    that fails is rolled back (exit code 9): the old model serves on.

    A swap lasts until the daemon starts anew, which serves what its configuration names, or until a reload finds
    another model_dir there. Of the model that is in force already nothing is done.
    """
    if force and drain is None:
        raise click.UsageError("--force needs --drain TIME")
    from lightllmctl import jobs

    body: dict[str, Any] = {"model": _model(context, model), "plan": plan, "force": force, "on_failure": on_failure}
    if drain is not None:
        body["drain_timeout"] = drain
    job = jobs.run(context, "swap", body, no_block, timeout)
    details = (job or {}).get("details") or {}
    if plan and details.get("plan"):
        context.console.print(_lines(details["plan"]))
    elif phases := details.get("phases"):
        took = sum(seconds for _, seconds in phases)
        context.console.print(
            f"{took:.2f} s: {', '.join(f'{_lines(name)} {seconds:.2f} s' for name, seconds in phases)}"
        )
    if kept := details.get("kept"):
        raise JobFailed(f"the new model is in force and does not serve yet, it is tried again: {_lines(kept)}")


def _model(context: CommandContext, text: str) -> str:
    """A path is the caller's: the daemon's directory is another one. What [models] names is no path."""
    relative = not (os.path.isabs(text) or text.startswith("package:"))
    if not relative or not ("/" in text or os.path.exists(text)):
        return text
    named = [str(model.get("name")) for model in context.client.get_list("/v1/models")]
    return text if text in named else os.path.abspath(text)


def _lines(text: Any) -> str:
    """`clean`, line by line."""
    from lightllmctl.render import clean

    return "\n".join(map(clean, str(text).splitlines()))


def _value(value: Any) -> str:
    return "-" if value is None else console.literal(value)


COMMANDS = (reload, swap)
