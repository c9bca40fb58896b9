"""The probe child: what model and device are like, from file headers and the operating system. No torch, no weights.

``python -m lightllmd.weights.probe`` reads a `Request` as JSON on stdin
and prints `config.plan.Facts` as JSON, or {"error": name, "message": …} with the error's exit code. It is a process of
its own so that a slow file system or a stuck driver never blocks the supervisor.
"""

from __future__ import annotations

import sys

import msgspec

from lightllmd.config.plan import Facts
from lightllmd.errors import ConfigInvalid, LightllmdError, Problem
from lightllmd.weights.device_facts import device_facts
from lightllmd.weights.model_facts import model_facts


class Request(msgspec.Struct, frozen=True):
    model_dir: str | None = None
    load_way: str = "HF"  # "DUMMY" needs no weight files
    backend: str = "torch"  # "fake" has no model
    device: str = "auto"  # "auto" | "cpu" | "cuda"
    threads: int = 0  # 0: the physical cores
    device_only: bool = False  # no model is looked for


def probe(request: Request) -> Facts:
    """Raises ConfigInvalid, WeightsInvalid or NoUsableDevice."""
    if request.backend == "fake" or request.device_only:
        return Facts(None, device_facts("cpu" if request.backend == "fake" else request.device, request.threads))
    if request.model_dir is None:
        raise ConfigInvalid([Problem("model_dir", "is missing: which model shall be served?")])
    model = model_facts(request.model_dir, dummy=request.load_way == "DUMMY")
    return Facts(model=model, device=device_facts(request.device, request.threads))


def main() -> int:
    try:
        facts = probe(msgspec.json.decode(sys.stdin.buffer.read(), type=Request))
    except LightllmdError as error:
        sys.stdout.buffer.write(msgspec.json.encode(error.as_dict()) + b"\n")
        return error.exit_code
    sys.stdout.buffer.write(msgspec.json.encode(facts) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
