"""The verbs of lightllmctl, a module for each kind: asking, commanding, cache, following, keys, settings, measuring."""

from __future__ import annotations

import click

from lightllmctl.commands import act, ask, bench, cache, change, completion, crash, follow, key, settings


def register(group: click.Group) -> None:
    """Adds every verb to `group`."""
    for module in (ask, act, change, cache, follow, crash, key, settings, bench, completion):
        for command in module.COMMANDS:
            group.add_command(command)
