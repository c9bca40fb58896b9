"""The real supervisor and the fake engine, with a spare one, which only a GPU would have: run as `lightllmd`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lightllmd.config.cli import parse
from lightllmd.config.plan import Plan
from lightllmd.supervisor.context import Commands
from lightllmd.supervisor.supervisor import main


class Spares(Commands):
    def early(self, plan: Plan) -> Sequence[str]:
        return [os.environ.get("SPARE_IMPORTS", "lightllmd.engine.scheduler")]


if __name__ == "__main__":
    sys.exit(main(parse(sys.argv[1:]), Spares()))
