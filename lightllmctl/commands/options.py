"""Options and arguments that several verbs share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import click

from lightllmctl.context import CommandContext
from lightllmd.errors import LightllmdError

json_option = click.option("--json", "as_json", is_flag=True, help='One JSON object, with `"api": 1`.')

LONGEST = 366 * 86400.0  # seconds; the daemon takes no more, either

_SECONDS = {"ms": 0.001, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = r"(\d+(?:\.\d+)?) *(ms|s|min|m|h|d) *"


class Duration(click.ParamType):
    """Seconds, as a number or as people write them: 90, 1.5s, 5m, 1h30m."""

    name = "duration"

    def __init__(self, *, zero: bool = False) -> None:
        self.zero = zero  # whether 0 is one

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds; fails (click.BadParameter) for text that is no duration, or out of bounds."""
        text = str(value).strip()
        if re.fullmatch(f"(?:{_PART})+", text):
            seconds = sum(float(number) * _SECONDS[unit] for number, unit in re.findall(_PART, text))
        elif re.fullmatch(r"\d+(\.\d*)?|\.\d+", text):
            seconds = float(text)
        else:
            self.fail(f"{text!r} is no duration; write seconds, or such as 90s, 5m, 1h30m", param, ctx)
        if seconds > LONGEST or (seconds == 0 and not self.zero):
            shown = text if len(text) <= 40 else f"{text[:39]}…"
            self.fail(f"{shown!r} is no duration {'of' if self.zero else 'above 0 and of'} at most 366d", param, ctx)
        return seconds


class Number(click.FloatRange):
    """A finite one within its bounds; click's own lets nan through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; fails (click.BadParameter) for one that is not finite or out of bounds."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no finite number", param, ctx)
        return number


def waiting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --no-block and --timeout to a verb that starts a job."""
    command = click.option("--no-block", is_flag=True, help="Start the job and return at once.")(command)
    return click.option("--timeout", type=Duration(), metavar="TIME", help="Wait no longer; exit code 10.")(command)


def names_at(path: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """The names of what the daemon lists at `path`, for the shell's completion; none when no daemon answers."""

    def complete(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
        try:
            listed = CommandContext(context.find_root().params.get("socket_path")).client.get_list(path)
        except LightllmdError:
            return []
        return [name for one in listed if (name := str(one.get("name", ""))).startswith(incomplete)]

    return complete


complete_worker = names_at("/v1/workers")
complete_model = names_at("/v1/models")
