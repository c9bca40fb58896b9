"""The probe child: what model and device are like, from file headers and the operating system. No torch, no weights.

``python -m lightllmd.weights.probe`` reads a `Request` as JSON on stdin
and prints `config.plan.Facts` as JSON, or {"error": name, "message": …} with the error's exit code. It is a process of
its own so that a slow file system or a stuck driver never blocks the supervisor.
"""

from __future__ import annotations

import sys

import msgspec

from lightllmd.config.parameters import Params
from lightllmd.config.plan import Facts, ModelFacts, Other
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
    others: dict[str, Params] = {}  # models beside that one, by name: what can't be read of them is told, no error


def probe(request: Request) -> Facts:
    """Raises ConfigInvalid, WeightsInvalid or NoUsableDevice."""
    if request.backend == "fake" or request.device_only:
        return Facts(None, device_facts("cpu" if request.backend == "fake" else request.device, request.threads))
    if request.model_dir is None:
        raise ConfigInvalid([Problem("model_dir", "is missing: which model shall be served?")])
    model = _read(request.model_dir, request.load_way)
    others = {name: _other(params) for name, params in request.others.items()}
    return Facts(model=model, device=device_facts(request.device, request.threads), others=others)


def _read(model_dir: str, load_way: str) -> ModelFacts:
    return model_facts(model_dir, dummy=load_way == "DUMMY")


def _other(params: Params) -> Other:
    try:
        return Other(params, _read(params.model_dir or "", params.load_way))
    except ConfigInvalid as invalid:
        return Other(params, fault="; ".join(problem.message for problem in invalid.problems))
    except LightllmdError as error:
        return Other(params, fault=error.message)


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
