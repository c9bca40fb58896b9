"""`lightllmd`: command line -> configuration -> supervisor."""

from __future__ import annotations

import sys

from lightllmd.config import cli
from lightllmd.errors import ConfigInvalid


def main() -> int:
    try:
        invocation = cli.parse()
    except ConfigInvalid as invalid:
        print(invalid.message, file=sys.stderr)
        return invalid.exit_code
    done = cli.finish(invocation)
    if done is not None:
        return done
    from lightllmd.supervisor import supervisor  # not needed by --check and --help

    return supervisor.main(invocation)


if __name__ == "__main__":
    sys.exit(main())
