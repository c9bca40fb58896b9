"""The verbs of lightllmctl, a module for each kind: asking, commanding, the cache, following, settings, measuring."""

from __future__ import annotations

import click

from lightllmctl.commands import act, ask, bench, cache, change, completion, crash, follow, settings


def register(group: click.Group) -> None:
    """Adds every verb to `group`."""
    for module in (ask, act, change, cache, follow, crash, settings, bench, completion):
        for command in module.COMMANDS:
            group.add_command(command)
