"""Verbs that change what is served: reload, swap. Each is a job of the daemon."""

from __future__ import annotations

import math
import os
import re
from typing import Any

import click

from lightllmctl.commands.act import waiting_options
from lightllmctl.context import Context, pass_context
from lightllmd.errors import LightllmdError

_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Duration(click.ParamType):
    """Seconds, as a number or as people write them: 90, 1.5s, 5m, 1h30m."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value).strip()
        parts = re.findall(r"(\d+(?:\.\d+)?) *(ms|s|min|m|h|d)", text)
        try:
            if not parts:
                seconds = float(text)
            elif "".join(f"{number}{unit}" for number, unit in parts) == text.replace(" ", ""):
                seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
            else:
                raise ValueError
        except ValueError:
            self.fail(f"{text!r} is no duration; write seconds, or such as 90s, 5m, 1h30m", param, ctx)
        if not 0 <= seconds < math.inf:
            self.fail(f"{text!r} is no duration from 0 up", param, ctx)
        return seconds


def complete_model(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Names of models for the shell's completion; none when no daemon answers."""
    try:
        models = Context(context.find_root().params.get("socket_path")).client.get_list("/v1/models")
    except LightllmdError:
        return []
    return [name for model in models if (name := str(model.get("name", ""))).startswith(incomplete)]


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would change, and how.")
@waiting_options
@pass_context
def reload(context: Context, dry_run: bool, no_block: bool, timeout: float | None) -> None:
    """Read the configuration again and put what changed in force, without dropping a request.

    Returns when all is in force, or when nothing is: 6 the file is bad, 8 it doesn't fit, 9 it failed on the way and
    was rolled back.
    """
    from lightllmctl.render import table

    job = _done(context, "reload", {"dry_run": True} if dry_run else {}, no_block, timeout)
    changes = job.get("details", {}).get("changes") or []
    if dry_run and changes:
        rows = [(str(c["key"]), _value(c["old"]), _value(c["new"]), str(c["reload"])) for c in changes]
        context.console.print(table(("SETTING", "IN FORCE", "IN THE FILE", "CLASS"), rows))


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.option("--plan", is_flag=True, help="Only say whether and how it fits; exit code 8 if it doesn't.")
@click.option(
    "--drain",
    type=Duration(),
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
    context: Context,
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
    """
    if force and drain is None:
        raise click.UsageError("--force needs --drain TIME")
    if os.path.exists(model) and not os.path.isabs(model) and model not in _names(context):
        model = os.path.abspath(model)  # the daemon's directory is another one
    body: dict[str, Any] = {"model": model, "plan": plan, "force": force, "on_failure": on_failure}
    if drain is not None:
        body["drain_timeout"] = drain
    job = _done(context, "swap", body, no_block, timeout)
    details = job.get("details") or {}
    if plan and details.get("plan"):
        context.console.print(details["plan"])
    elif phases := details.get("phases"):
        context.console.print(", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases))


def _names(context: Context) -> list[str]:
    return [str(model.get("name")) for model in context.client.get_list("/v1/models")]


def _done(context: Context, verb: str, body: dict[str, Any], no_block: bool, timeout: float | None) -> dict[str, Any]:
    """The job at its end, or as it was started where nobody waits for it."""
    from lightllmctl import jobs
    from lightllmctl.render import clean, job_name

    job = context.client.post(f"/v1/{verb}", body)
    if no_block:
        click.echo(f"job {job_name(job)} started")
        return job
    job = jobs.wait(context, job, timeout)
    click.echo(f"job {job_name(job)} done: {clean(job.get('message') or '')}")
    return job


def _value(value: Any) -> str:
    import json

    return "-" if value is None else json.dumps(value, ensure_ascii=False)


COMMANDS = (reload, swap)
