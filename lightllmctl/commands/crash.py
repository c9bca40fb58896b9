"""The verb that shows crash reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lightllmctl.commands.options import json_option
from lightllmctl.context import CommandContext, pass_context
from lightllmd import console
from lightllmd.errors import LightllmdError, NoSuchCrash, Usage

if TYPE_CHECKING:
    from rich.text import Text

LAST = "last"
_LABEL_WIDTH = 10


def complete_crash(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The reports there are, for the shell's completion; none when no daemon answers."""
    socket_path = context.find_root().params.get("socket_path")
    try:
        crashes = CommandContext(socket_path).client.get_list("/v1/crashes")
    except LightllmdError:
        return []
    names = [LAST, *(str(crash.get("id", "")) for crash in crashes)]
    return [name for name in names if name.startswith(incomplete)]


@click.command()
@json_option
@click.argument("which", metavar="[ID]", required=False, shell_complete=complete_crash)
@pass_context
def crash(context: CommandContext, as_json: bool, which: str | None) -> None:
    """List the workers' crashes, or show the report of one.

    ID: a number from the list, or "last" for the newest.
    """
    if which is None:
        crashes = context.client.get_list("/v1/crashes")
        if as_json:
            context.echo_json({"api": 1, "crashes": crashes})
        elif crashes:
            context.console.print(_table(crashes))
        else:
            console.say("No crashes.")
        return
    report = context.client.get(f"/v1/crashes/{_number(context, which)}")
    if as_json:
        context.echo_json({"api": 1, **report})
    else:
        context.console.print(crash_page(report))


def _number(context: CommandContext, which: str) -> int:
    if which == LAST:
        crashes = context.client.get_list("/v1/crashes")
        if not crashes:
            raise NoSuchCrash("there are no crash reports")
        return int(crashes[0]["id"])
    number = which.removeprefix("#")
    if not (number.isascii() and number.isdecimal() and len(number) < 16):
        raise Usage(f"ID {which!r}: a number from the list, or {LAST}")
    return int(number)


def _table(crashes: list[dict[str, Any]]) -> Text:
    from lightllmctl import render, units

    rows = [
        (
            f"#{crash.get('id', '?')}",
            units.stamp(crash["at"]) if crash.get("at") else "-",
            render.clean(crash.get("worker", "?")),
            str(crash.get("pid", "-")),
            str(crash.get("generation", "-")),
            render.clean(crash.get("phase") or "-"),
            render.clean(crash.get("cause", "?")),
        )
        for crash in crashes
    ]
    headers = ("CRASH", "WHEN", "WORKER", "PID", "GENERATION", "PHASE", "CAUSE")
    return render.table(headers, rows, right=(3, 4))


def crash_page(report: dict[str, Any]) -> Text:
    """One report, a line for each thing that is known, then the worker's last output."""
    from rich.text import Text

    from lightllmctl import render

    page = Text()
    page.append(f"Crash #{report.get('id', '?')}: {render.clean(report.get('worker', '?'))}\n", render.STRONG)
    for label, value in _facts(report):
        page.append(f"{label:>{_LABEL_WIDTH}}: ")
        page.append(f"{render.clean(value)}\n", render.BAD if label == "Cause" else "")
    output = report.get("stderr") or []
    page.append(f"{'Output':>{_LABEL_WIDTH}}:{'' if output else ' none'}\n")
    for line in output:
        page.append(f"  {render.clean(line)}\n")
    page.rstrip()
    return page


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    from lightllmctl import units

    facts = [("Cause", _cause(report))]
    if (at := report.get("at")) is not None:
        facts.append(("When", f"{units.instant(at)}, {units.duration(report.get('uptime_s', 0))} after its start"))
    where = f"pid {report.get('pid', '?')}, generation {report.get('generation', '?')}"
    facts.append(("Process", f"{where}, phase {report.get('phase') or '?'}"))
    if report.get("last_step") is not None:
        facts += _step(report["last_step"])
    memory = [f"{units.size(report['memory_bytes'])} resident"] if report.get("memory_bytes") else []
    stats = report.get("stats") or {}
    for name, value in stats.items():
        if name.startswith("memory_"):
            memory.append(f"{name.removeprefix('memory_').replace('_', ' ')} {units.size(value)}")
    if memory:
        facts.append(("Memory", ", ".join(memory)))
    load = [
        f"{stats[name]:g} {name}" for name in ("running", "waiting", "paused", "in_flight", "held") if stats.get(name)
    ]
    if load:
        facts.append(("Load", ", ".join(load)))
    if (xids := report.get("xids")) is not None:
        facts.append(("Xid", ", ".join(map(str, xids)) or "none"))
    served = f"{report.get('model', '?')}, revision {report.get('revision', '?')}"
    facts.append(("Model", f"{served}, configuration {report.get('config_digest', '?')}"))
    facts.append(("Version", str(report.get("version", "?"))))
    return facts


def _cause(report: dict[str, Any]) -> str:
    """With the signal or exit code where the words don't have it."""
    cause, signal, code = str(report.get("cause", "?")), report.get("signal"), report.get("exit_code")
    if signal and signal not in cause:
        return f"{cause} ({signal})"
    if signal is None and code is not None and f"exit {code}" not in cause:
        return f"{cause} (exit {code})"
    return cause


def _step(step: dict[str, Any]) -> list[tuple[str, str]]:
    line = f"step {step.get('number', '?')}: {step.get('kind', '?')}, {step.get('rows', '?')} rows"
    facts = [("Last step", f"{line}, {step.get('tokens', '?')} tokens")]
    unproven = [str(number) for number in step.get("unproven") or []]
    if unproven:
        more = step.get("unproven_total", 0) - len(unproven)
        facts.append(("Suspects", f"requests {', '.join(unproven)}{f' and {more} more' if more > 0 else ''}"))
    return facts


COMMANDS = (crash,)
