"""The command line: global options, the verbs, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from lightllmctl import commands
from lightllmctl.commands.group import VerbGroup
from lightllmctl.context import CommandContext
from lightllmd import __version__, console
from lightllmd.errors import CTL_DONE, CTL_FAILED, CTL_INTERRUPTED, CTL_USAGE, ConfigInvalid, LightllmdError

PROGRAM = "lightllmctl"
COMPLETION_VARIABLE = "_LIGHTLLMCTL_COMPLETE"


@click.group(
    cls=VerbGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    invoke_without_command=True,
)
@click.option(
    "--socket",
    "socket_path",
    metavar="PATH",
    type=click.Path(readable=False),
    help="The daemon's control socket. Default: $LIGHTLLMD_SOCKET, else your own daemon's if it has one, else the "
    "system's (/run/lightllmd/control.sock).",
)
@click.version_option(__version__, prog_name=PROGRAM)
@click.pass_context
def cli(context: click.Context, socket_path: str | None) -> int:
    """Asks and commands a lightllmd daemon over its control socket.

    Exit codes: 0 done or active, 1 failed or degraded, 2 usage, 3 not active or not running, 4 no such worker, job
    or model, 5 not permitted, 6 configuration invalid, 7 busy, 8 does not fit, 9 rolled back, 10 timed out while
    the job goes on, 130 interrupted.
    """
    context.obj = CommandContext(socket_path)
    context.call_on_close(context.obj.close)
    if context.invoked_subcommand is None:
        console.complain(context.get_help())
    return CTL_USAGE


commands.register(cli)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns its exit code, one of CTL_* in ``lightllmd.errors``."""
    console.prepare()
    try:
        return _run(sys.argv[1:] if arguments is None else list(arguments))
    except BrokenPipeError:  # the reader has seen enough
        console.silence(sys.stdout)
        return CTL_DONE
    except (KeyboardInterrupt, click.Abort):
        return CTL_INTERRUPTED


def _run(arguments: list[str]) -> int:
    try:
        code = _invoke(arguments)
        sys.stdout.flush()
        return code
    except click.ClickException as error:
        return _fail(error.format_message(), CTL_USAGE)
    except ConfigInvalid as error:
        for problem in error.problems:
            console.complain(_shortened(str(problem)))
        return error.ctl_code
    except LightllmdError as error:
        return _fail(error.message, error.ctl_code)
    except BrokenPipeError:
        raise
    except OSError as error:
        console.silence(sys.stdout)  # it may be what failed
        return _fail(str(error), CTL_FAILED)
    except Exception as error:  # a fault of this program; the shell that called it still gets a line and a code
        return _fail(f"internal error: {type(error).__name__}: {error}", CTL_FAILED)


def _invoke(arguments: list[str]) -> int:
    if instruction := os.environ.get(COMPLETION_VARIABLE):
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, PROGRAM, COMPLETION_VARIABLE, instruction)
    try:
        with cli.make_context(PROGRAM, arguments) as context:
            return cli.invoke(context) or CTL_DONE
    except click.exceptions.Exit as done:
        return done.exit_code


def _fail(message: str, code: int) -> int:
    console.complain(f"{PROGRAM}: {_shortened(' '.join(message.split()))}")
    return code


def _shortened(message: str) -> str:
    """What was asked may be in it, of any length; the cause stands at its end."""
    return message if len(message) <= 2000 else f"{message[:1000]} … {message[-500:]}"


if __name__ == "__main__":
    sys.exit(main())
