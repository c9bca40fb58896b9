"""The shell's completion script."""

from __future__ import annotations

import click

from lightllmd import console


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    Bash: `source <(lightllmctl completion bash)`
    """
    console.say(script(context.find_root().command, shell))


def script(cli: click.Command, shell: str) -> str:
    """The completion script of lightllmctl for `shell`. Raises click.UsageError for a shell that click doesn't know."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    complete = kind(cli, {}, "lightllmctl", "_LIGHTLLMCTL_COMPLETE")
    # Not complete.source(): bash's would run the installed bash to ask its version.
    return complete.source_template % complete.source_vars()


COMMANDS = (completion,)
