"""What every verb shares: which daemon is meant, and how to print."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lightllmd import console

if TYPE_CHECKING:
    from rich.console import Console

    from lightllmctl.client import Client

SYSTEM_SOCKET = Path("/run/lightllmd/control.sock")


@dataclass
class CommandContext:
    """Passed to every verb by click. Opening connections and importing rich and httpx wait until they are needed."""

    socket_option: str | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @cached_property
    def socket_path(self) -> Path:
        """Of the daemon that is meant."""
        return choose_socket(self.socket_option, self.environ, os.getuid())

    @cached_property
    def client(self) -> Client:
        """Of that daemon; nothing is connected yet."""
        from lightllmctl.client import Client

        return Client(self.socket_path)

    @cached_property
    def console(self) -> Console:
        """Of standard output; it prints control characters of texts as escapes."""
        return _console(sys.stdout)

    def close(self) -> None:
        """Closes the client, if there is one."""
        if "client" in vars(self):
            self.client.close()

    def echo_json(self, value: Any) -> None:
        """Prints `value` as JSON: indented on a terminal, else on one line."""
        console.say(console.literal(value, indent=2 if sys.stdout.isatty() else None))


pass_context = click.make_pass_decorator(CommandContext)


def choose_socket(option: str | None, environ: Mapping[str, str], uid: int) -> Path:
    """``--socket``, else $LIGHTLLMD_SOCKET, else the user's own if present, else the system's."""
    if option:
        return Path(option)
    if named := environ.get("LIGHTLLMD_SOCKET"):
        return Path(named)
    own = [Path(f"/tmp/lightllmd-{uid}/control.sock")]
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        own.insert(0, Path(runtime) / "lightllmd" / "control.sock")
    return next((path for path in own if _is_socket_of(path, uid)), SYSTEM_SOCKET)


def _is_socket_of(path: Path, uid: int) -> bool:
    """/tmp is everyone's: what another user put where our socket would be is not ours."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISSOCK(found.st_mode) and found.st_uid == uid


def _console(file: Any) -> Console:
    """A rich console that never wraps or guesses, is plain when not on a terminal, and leaves EPIPE to `main`.

    Of control characters only its own reach the terminal, whatever the texts hold.
    """
    from rich.console import Console
    from rich.segment import Segment

    class PlainConsole(Console):
        def render(self, *arguments: Any, **options: Any) -> Iterator[Segment]:
            for segment in super().render(*arguments, **options):
                yield segment if segment.control else Segment(console.printable(segment.text), segment.style)

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    made = PlainConsole(file=file, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if made.width < 1:  # COLUMNS=0; rich would print nothing
        made.width = 80
    return made
