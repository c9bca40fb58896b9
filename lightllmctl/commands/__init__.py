"""The verbs of lightllmctl, a module for each kind: asking, commanding, following, configuration, measuring."""

from __future__ import annotations

import click

from lightllmctl.commands import act, ask, bench, change, completion, crash, follow, settings


def register(group: click.Group) -> None:
    for module in (ask, act, change, follow, crash, settings, bench, completion):
        for command in module.COMMANDS:
            group.add_command(command)
