"""Verbs that ask and change nothing: status, is-active, is-ready, list-models, list-workers, list-jobs, version."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from lightllmctl.commands.options import Number, json_option
from lightllmctl.context import CommandContext, pass_context
from lightllmd import __version__, console
from lightllmd.errors import CTL_DONE, CTL_FAILED, CTL_NOT_ACTIVE, DaemonNotRunning, LightllmdError

_CODES = {"active": CTL_DONE, "degraded": CTL_FAILED}


def _exit_code(activity: str) -> int:
    return _CODES.get(activity, CTL_NOT_ACTIVE)


@click.command()
@json_option
@click.option("-w", "--watch", is_flag=True, help="Refresh until ^C; waits for a daemon that is down.")
@click.option("--interval", type=Number(min=0.05, max=86400), default=1.0, show_default=True, help="Seconds, with -w.")
@pass_context
def status(context: CommandContext, as_json: bool, watch: bool, interval: float) -> int:
    """Show what runs.

    Exit code: 0 active, 1 degraded, 3 starting, stopping or not running.
    """
    from lightllmctl.render import activity

    if watch:
        _watch(context, as_json, interval)
    answer = context.client.get("/v1/status")
    if as_json:
        context.echo_json(answer)
    else:
        context.console.print(_page(context, answer))
    return _exit_code(activity(answer).word)


def _page(context: CommandContext, answer: dict[str, Any]) -> Any:
    from lightllmctl.render import ASCII, UNICODE, status_page

    return status_page(answer, time.time(), ASCII if context.console.options.ascii_only else UNICODE)


def _watch(context: CommandContext, as_json: bool, interval: float) -> None:
    """Until KeyboardInterrupt. Errors of the moment are shown, not raised: what is watched may be restarting."""
    from contextlib import nullcontext

    from rich.live import Live
    from rich.text import Text

    def page() -> Any:
        try:
            return _page(context, context.client.get("/v1/status"))
        except LightllmdError as error:
            return Text(error.message, "red")

    live = sys.stdout.isatty() and not as_json
    with Live(console=context.console, screen=True, auto_refresh=False) if live else nullcontext() as screen:
        while True:
            if as_json:
                context.echo_json(_status_or_error(context))
            elif screen is not None:
                screen.update(page(), refresh=True)
            else:
                context.console.print(page(), "")
            sys.stdout.flush()
            time.sleep(interval)


def _status_or_error(context: CommandContext) -> dict[str, Any]:
    try:
        return context.client.get("/v1/status")
    except LightllmdError as error:
        return {"api": 1, **error.as_dict()}


@click.command("is-active")
@click.option("-q", "--quiet", is_flag=True, help="The exit code alone.")
@pass_context
def is_active(context: CommandContext, quiet: bool) -> int:
    """Does the daemon run, with an engine?

    Exit code: 0 active, 1 degraded, 3 anything else.
    """
    from lightllmctl.render import activity

    try:
        word = activity(context.client.get("/v1/status")).word
    except DaemonNotRunning:
        word = "inactive"
    if not quiet:
        console.say(word)
    return _exit_code(word)


@click.command("is-ready")
@click.option("-q", "--quiet", is_flag=True, help="The exit code alone.")
@pass_context
def is_ready(context: CommandContext, quiet: bool) -> int:
    """Are new requests accepted and answered?

    Exit code: 0 ready, 1 degraded, 3 not ready.
    """
    from lightllmctl.render import activity, clean

    try:
        answer = context.client.get("/v1/status")
    except DaemonNotRunning:
        answer = {"state": "inactive", "health": "lightllmd is not running"}
    ready = bool(answer.get("ready"))
    if not quiet:
        console.say("ready" if ready else f"not ready: {clean(answer.get('health') or answer.get('state', '?'))}")
    if ready:
        return CTL_DONE
    return CTL_FAILED if activity(answer).word == "degraded" else CTL_NOT_ACTIVE


@click.command("list-workers")
@json_option
@pass_context
def list_workers(context: CommandContext, as_json: bool) -> None:
    """List the worker processes.

    Those that wait for their next start, too.
    """
    from rich.text import Text

    from lightllmctl import render, units

    workers = context.client.get_list("/v1/workers")
    if as_json:
        context.echo_json({"api": 1, "workers": workers})
        return
    rows = [
        (
            render.clean(worker.get("name", "?")),
            render.clean(worker.get("kind", "?")),
            _or_dash(worker.get("rank")),
            _or_dash(worker.get("pid")),
            Text(*render.worker_state(worker)),
            _or_dash(worker.get("restarts")),
            _or_dash(worker.get("generation")),
            units.size(worker["memory_bytes"]) if worker.get("memory_bytes") else "-",
        )
        for worker in workers
    ]
    headers = ("NAME", "KIND", "RANK", "PID", "STATE", "RESTARTS", "GENERATION", "MEMORY")
    context.console.print(render.table(headers, rows, right=(2, 3, 5, 6, 7)))


@click.command("list-models")
@json_option
@pass_context
def list_models(context: CommandContext, as_json: bool) -> None:
    """List the models that a swap knows by name; the one that is served first."""
    from lightllmctl import render

    models = context.client.get_list("/v1/models")
    if as_json:
        context.echo_json({"api": 1, "models": models})
        return
    rows = [
        (
            render.clean(model.get("name", "?")),
            "yes" if model.get("served") else "-",
            render.clean(model.get("model_dir") or "-"),
        )
        for model in models
    ]
    context.console.print(render.table(("NAME", "SERVED", "MODEL_DIR"), rows))


@click.command("list-jobs")
@json_option
@pass_context
def list_jobs(context: CommandContext, as_json: bool) -> None:
    """List the jobs that run and those that ended lately."""
    from rich.text import Text

    from lightllmctl import render, units

    jobs = context.client.get_list("/v1/jobs")
    if as_json:
        context.echo_json({"api": 1, "jobs": jobs})
        return
    if not jobs:
        console.say("No jobs.")
        return
    styles = {"done": "green", "failed": "red", "rolled-back": "red", None: "yellow"}
    now = time.time()
    rows = [
        (
            f"#{job.get('id', '?')}",
            render.clean(job.get("verb", "?")),
            render.clean(job.get("target") or "-"),
            Text(render.clean(job.get("outcome") or job.get("phase", "?")), styles.get(job.get("outcome"), "")),
            units.stamp(job["started"]) if job.get("started") else "-",
            units.duration((job.get("ended") or now) - job["started"]) if job.get("started") else "-",
            render.clean(job.get("message") or ""),
        )
        for job in jobs
    ]
    headers = ("JOB", "VERB", "TARGET", "STATE", "STARTED", "TOOK", "MESSAGE")
    context.console.print(render.table(headers, rows, right=(5,)))


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)


@click.command()
@json_option
@pass_context
def version(context: CommandContext, as_json: bool) -> None:
    """The versions of lightllmctl and of the daemon."""
    try:
        daemon = context.client.get("/v1/version")
    except DaemonNotRunning:
        daemon = None
    if as_json:
        context.echo_json({"api": 1, "lightllmctl": __version__, "daemon": daemon})
        return
    console.say(f"lightllmctl {__version__}")
    if daemon is None:
        console.say("lightllmd is not running")
    else:
        console.say(
            f"lightllmd {daemon.get('version', '?')} (Python {daemon.get('python', '?')}, pid {daemon.get('pid')})"
        )


COMMANDS = (status, is_active, is_ready, list_models, list_workers, list_jobs, version)
