"""``python -m lightllmd.batch IN OUT``: a file of OpenAI batch lines, answered without a daemon."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lightllmd import console
from lightllmd.config import cli
from lightllmd.errors import EXIT_FAILED, EXIT_OK, EXIT_SYSTEM, LightllmdError

USAGE = """usage: python -m lightllmd.batch IN OUT [--config FILE] [--any-setting VALUE ...]

Answers the requests of IN, a JSON object of OpenAI's batch format on each line, into OUT. The flags are lightllmd's.
Again, it goes on where it was broken off: lines whose custom_id is in OUT are passed over."""


def main(argv: Sequence[str] | None = None) -> int:
    """0: all lines are answered, those that were wrong with an error. Else an exit code of `lightllmd.errors`."""
    console.prepare()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) < 2 or any(one.startswith("-") for one in arguments[:2]):
        print(USAGE)
        return EXIT_OK if arguments in (["-h"], ["--help"]) else 2
    source, target = map(Path, arguments[:2])
    try:
        config = cli.parse(arguments[2:]).config
        from lightllmd.batch.run import run_batch  # brings the engine along
        from lightllmd.offline import LLM

        with source.open("rb"), LLM.of(config) as llm:
            counts = run_batch(llm, source, target)
    except LightllmdError as failure:
        console.complain(failure.message)
        return failure.exit_code
    except OSError as refused:
        console.complain(f"{refused.filename}: {refused.strerror}")
        return EXIT_SYSTEM
    except KeyboardInterrupt:
        console.complain("interrupted; the same command goes on from here")
        return EXIT_FAILED
    print(f"{counts.total} lines: {counts.completed} answered, {counts.failed} failed, {counts.skipped} done before")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
