"""The real supervisor with stand-in children: run as `lightllmd`, see `StandInDaemon`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lightllmd.config.cli import parse
from lightllmd.config.plan import Plan
from lightllmd.errors import LightllmdError
from lightllmd.supervisor.context import Commands
from lightllmd.supervisor.main import main

SPARE = "spare"  # what the command line of a spare ends with
STAND_IN = str(Path(__file__).with_name("stand_in.py"))
STAND_IN_PROBE = str(Path(__file__).with_name("stand_in_probe.py"))


class StandIns(Commands):
    def probe(self) -> list[str]:
        told = Path(os.environ["STAND_IN"], "probe.json").exists()
        return [self.python, STAND_IN_PROBE] if told else super().probe()

    def api(self, channel_fd: int) -> list[str]:
        return [self.python, STAND_IN, "api", str(channel_fd), str(os.getpid())]

    def engine(
        self, channel_fd: int, flight_fd: int, early: Sequence[str] = (), context_on: str | None = None
    ) -> list[str]:
        return [self.python, STAND_IN, "engine", str(channel_fd), str(os.getpid()), str(flight_fd), *early]

    def push(self, channel_fd: int) -> list[str]:
        broken = Path(os.environ["STAND_IN"], "push.json").exists()
        return ["false"] if broken else super().push(channel_fd)

    def early(self, plan: Plan) -> Sequence[str]:
        return [SPARE] if plan.device.kind == "cuda" else ()


if __name__ == "__main__":
    try:
        sys.exit(main(parse(sys.argv[1:]), StandIns()))
    except LightllmdError as refusal:
        print(refusal.message, file=sys.stderr)
        sys.exit(refusal.exit_code)
