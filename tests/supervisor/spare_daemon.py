"""The real supervisor and the fake engine, with a spare one, which only a GPU would have: run as `lightllmd`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lightllmd.config.cli import parse
from lightllmd.config.plan import Plan
from lightllmd.supervisor.context import Commands
from lightllmd.supervisor.main import main


class Spares(Commands):
    def early(self, plan: Plan) -> Sequence[str]:
        return [os.environ.get("SPARE_IMPORTS", "lightllmd.engine.scheduling.scheduler")]

    def engine(
        self, channel_fd: int, flight_fd: int, early: Sequence[str] = (), context_on: str | None = None
    ) -> list[str]:
        return super().engine(channel_fd, flight_fd, early, os.environ.get("SPARE_CONTEXT") if early else None)


if __name__ == "__main__":
    sys.exit(main(parse(sys.argv[1:]), Spares()))
