"""`lightllmd`: command line -> configuration -> supervisor."""

from __future__ import annotations

import sys
from collections.abc import Callable

from lightllmd import console
from lightllmd.config import cli
from lightllmd.errors import EXIT_OK, EXIT_SYSTEM, ConfigInvalid, LightllmdError


def main() -> int:
    """Runs the command; its exit code is one of EXIT_* in `lightllmd.errors`."""
    console.prepare()
    try:
        invocation = cli.parse()
    except ConfigInvalid as invalid:
        console.complain(invalid.message)
        return invalid.exit_code
    except SystemExit as asked:  # by --help, --version, a flag that doesn't exist
        code = int(asked.code or EXIT_OK)
        return _printed(lambda: code) or EXIT_OK
    if invocation.action == "check" and not invocation.offline and (refused := _look(invocation)) is not None:
        return refused
    done = _printed(lambda: cli.finish(invocation))
    if done is not None:
        return done
    from lightllmd.supervisor.main import main as serve  # not needed by --check and --help

    return serve(invocation)


def _look(invocation: cli.Invocation) -> int | None:
    """The exit code that a start would end with, once its reason is told; None: it would serve."""
    from lightllmd.supervisor.change import preflight
    from lightllmd.supervisor.change.settings import Settings

    try:
        plan, short = preflight.look(Settings.for_model(invocation.config, None), invocation.config_file)
    except LightllmdError as refusal:
        console.complain(refusal.message)
        return refusal.exit_code
    for problem in short:
        console.complain(f"warning, for now: {problem}")
    for warning in plan.warnings:
        console.complain(f"warning: {warning}")
    return None


def _printed(print_it: Callable[[], int | None]) -> int | None:
    """What `print_it` returns, once all of it has been written."""
    try:
        code = print_it()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has seen enough
        console.silence(sys.stdout)
        return EXIT_OK
    except OSError as refused:
        console.silence(sys.stdout)
        console.complain(f"lightllmd: standard output: {refused.strerror}")
        return EXIT_SYSTEM


if __name__ == "__main__":
    sys.exit(main())
