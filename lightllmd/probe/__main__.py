"""The probe child. ``python -m lightllmd.probe`` reads a `Request` as JSON on stdin and prints lines of JSON: before
each model that it reads {"reading": model_dir}, last `config.plan.Facts`, or {"error": name, "message": …} with the
error's exit code.

It is a process of its own so that a slow file system, a stuck driver or a hostile file never blocks the supervisor.
What a file makes a library do can take any time and can't be interrupted, so each model has a bound of processor time,
beyond which the kernel ends the process: the last line names the model then.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

import msgspec

from lightllmd.errors import EXIT_CONFIG, LightllmdError, WeightsInvalid
from lightllmd.probe.facts import Request, probe

CPU_SECONDS = 5  # of one model; the largest known tokenizer takes 2


def main() -> int:
    """Reads a `Request` from standard input, writes the facts or an error. Returns the exit status."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    try:
        answer = msgspec.json.encode(probe(request, _reading))
    except LightllmdError as error:
        _print(error.as_dict())
        return error.exit_code
    except UnicodeEncodeError:
        _print(WeightsInvalid(f"{request.model_dir}: the name of a file in it is not valid UTF-8").as_dict())
        return EXIT_CONFIG
    sys.stdout.buffer.write(answer + b"\n")
    return 0


def _reading(model_dir: str) -> None:
    """Also gives it its time: SIGXCPU follows."""
    _print({"reading": model_dir})
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _print(line: dict[str, Any]) -> None:
    """What is no Unicode (a file's name, a value that a message shows) is replaced."""
    sys.stdout.buffer.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
