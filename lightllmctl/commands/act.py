"""Verbs about what runs: restart, drain, resume, stop, reset-failed. Each is a job of the daemon."""

from __future__ import annotations

from typing import Any

import click

from lightllmctl.commands.options import complete_worker, waiting_options
from lightllmctl.context import CommandContext, pass_context
from lightllmd import console
from lightllmd.errors import ConnectionLost, DaemonNotRunning, JobGoesOn


def _run(context: CommandContext, verb: str, body: dict[str, Any], no_block: bool, timeout: float | None) -> None:
    from lightllmctl import jobs

    jobs.run(context, verb, body, no_block, timeout)


@click.command()
@click.argument("worker", required=False, shell_complete=complete_worker)
@waiting_options
@pass_context
def restart(context: CommandContext, worker: str | None, no_block: bool, timeout: float | None) -> None:
    """Restart WORKER, or all of them one by one.

    "engine" is every rank of it. Requests in flight are held, not lost, and go on on the next generation.
    """
    _run(context, "restart", {"worker": worker} if worker else {}, no_block, timeout)


@click.command()
@waiting_options
@pass_context
def drain(context: CommandContext, no_block: bool, timeout: float | None) -> None:
    """Refuse new requests, let those in flight finish."""
    _run(context, "drain", {}, no_block, timeout)


@click.command()
@waiting_options
@pass_context
def resume(context: CommandContext, no_block: bool, timeout: float | None) -> None:
    """Accept requests again after a drain."""
    _run(context, "resume", {}, no_block, timeout)


@click.command()
@click.option("--now", is_flag=True, help="End the requests in flight instead of letting them finish.")
@waiting_options
@pass_context
def stop(context: CommandContext, now: bool, no_block: bool, timeout: float | None) -> None:
    """Drain, then end the daemon; return when it is gone."""
    import time

    from lightllmctl import jobs
    from lightllmctl.render import job_name

    began = time.monotonic()
    client = context.client
    pid = client.get("/v1/status").get("pid")
    pid = pid if pid == client.daemon_pid() else None  # the daemon may live in another pid namespace
    job = client.post("/v1/stop", {"now": now})
    if no_block:
        console.say(f"job {job_name(job)} started")
        return
    try:
        jobs.wait(context, job, timeout)
    except (ConnectionLost, DaemonNotRunning):
        pass  # a stop job's stream ends with the daemon itself
    left = None if timeout is None else max(timeout - (time.monotonic() - began), 0.0)
    if not client.wait_gone(pid, left):
        raise JobGoesOn(f"the daemon was not gone within {timeout:g} s; job {job_name(job)} goes on")
    console.say("lightllmd has stopped")


@click.command("reset-failed")
@click.argument("worker", required=False, shell_complete=complete_worker)
@waiting_options
@pass_context
def reset_failed(context: CommandContext, worker: str | None, no_block: bool, timeout: float | None) -> None:
    """Forget past failures of WORKER, or of all; one that was given up starts again."""
    _run(context, "reset-failed", {"worker": worker} if worker else {}, no_block, timeout)


COMMANDS = (restart, drain, resume, stop, reset_failed)
