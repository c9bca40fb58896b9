"""Waiting for a job: a progress bar on a terminal, a line per phase elsewhere, and its outcome as an exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from lightllmctl.client import named_error
from lightllmctl.context import CommandContext
from lightllmctl.render import clean, job_name
from lightllmd import console
from lightllmd.errors import ConfigInvalid, ConnectionLost, JobFailed, JobGoesOn, NoAnswer, RolledBack

Job = dict[str, Any]


class Display(Protocol):
    """Where a job's state is shown while it runs."""

    def show(self, job: Job) -> None:
        """Shows the job's newest state."""


def run(context: CommandContext, verb: str, body: dict[str, Any], no_block: bool, timeout: float | None) -> Job | None:
    """Starts a job, waits for it and says how it ended; raises as `wait` does. None: it was not waited for."""
    job = context.client.post(f"/v1/{verb}", body)
    if no_block:
        console.say(f"job {job_name(job)} started")
        return None
    job = wait(context, job, timeout)
    message = clean(job.get("message") or "")
    _say(f"job {job_name(job)} done{f': {message}' if message else ''}")
    return job


def wait(context: CommandContext, job: Job, timeout: float | None) -> Job:
    """Follows ``job`` to its end and returns its last state.

    Raises what the daemon names as its error, else JobFailed or RolledBack; JobGoesOn after ``timeout`` seconds,
    ConnectionLost when the daemon went away before there was an outcome. ^C leaves the job running and says so.
    """
    try:
        with _display(context) as display:
            _show(display, job)
            for job in context.client.stream(f"/v1/jobs/{job['id']}", wait=timeout):  # noqa: B020 - its newest state
                _show(display, job)
    except NoAnswer as error:
        raise JobGoesOn(f"job {job_name(job)} was not finished within {timeout:g} s and goes on") from error
    except KeyboardInterrupt:
        console.complain(f"\njob {job_name(job)} goes on; see lightllmctl list-jobs")
        raise
    return judged(job)


def _say(line: str) -> None:
    """A job is followed to its end also where nothing reads of it: the exit code tells its outcome."""
    try:
        console.say(line)
    except OSError:
        console.silence(sys.stdout)


def _show(display: Display, job: Job) -> None:
    """The outcome is told by `run`, not as one phase more."""
    if job.get("outcome") is None:
        display.show(job)


def judged(job: Job) -> Job:
    """Raises what the daemon says went wrong, so that its exit code is that of the cause."""
    outcome, message = job.get("outcome"), clean(job.get("message") or "no reason was given")
    if outcome == "done":
        return job
    if outcome is None:
        raise ConnectionLost(f"the daemon ended before job {job_name(job)} did")
    rolled_back = outcome == "rolled-back"
    error = named_error(job.get("error") or {}, RolledBack if rolled_back else JobFailed)
    if isinstance(error, ConfigInvalid):
        raise error  # it names the file and the line of each problem
    raise type(error)(f"job {job_name(job)} {'was rolled back' if rolled_back else outcome}: {message}")


@contextmanager
def _display(context: CommandContext) -> Iterator[Display]:
    if not context.console.is_terminal:
        yield Lines()
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=context.console, transient=True) as progress:
        yield JobBar(progress)


class Lines:
    """A line whenever the phase changed."""

    def __init__(self) -> None:
        self.last = ""

    def show(self, job: Job) -> None:
        """Prints the phase where it changed."""
        line = f"job {job_name(job)}: {clean(job.get('phase', ''))}"
        if line != self.last:
            _say(line)
            self.last = line


class JobBar:
    """One bar; it pulses while the job doesn't know how far it is."""

    def __init__(self, progress: Any) -> None:
        self.progress = progress
        self.task = progress.add_task("", total=None)

    def show(self, job: Job) -> None:
        """Moves the bar, and names the phase beside it."""
        done = job.get("progress")
        description = f"{job_name(job)}: {clean(job.get('phase', ''))}"
        self.progress.update(self.task, description=description, completed=done or 0, total=None if done is None else 1)
