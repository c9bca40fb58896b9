"""A group of verbs: lightllmctl itself, and a verb that has verbs of its own."""

from __future__ import annotations

import difflib

import click


class VerbGroup(click.Group):
    """Names the nearest verb when one is misspelt."""

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's; an unknown verb is refused with the nearest one."""
        if arguments and not arguments[0].startswith("-") and self.get_command(context, arguments[0]) is None:
            near = difflib.get_close_matches(arguments[0], self.list_commands(context), n=1)
            hint = f", did you mean {near[0]}?" if near else f"; {context.command_path} --help lists them"
            raise click.UsageError(f"no such verb: {arguments[0]}{hint}")
        return super().resolve_command(context, arguments)
