"""What the probe is asked and answers: the facts that a plan is made from."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from lightllmd.config.parameters import Params
from lightllmd.config.plan import Facts, Other
from lightllmd.errors import ConfigInvalid, LightllmdError, Problem
from lightllmd.probe.devices import device_facts
from lightllmd.probe.model import model_facts


class Request(msgspec.Struct, frozen=True):
    """Which model and device the facts are asked of."""

    model_dir: str | None = None
    load_way: str = "HF"
    backend: str = "auto"  # as [engine] backend; "fake" has no model
    device: str = "auto"  # "auto" | "cpu" | "cuda"
    threads: int = 0  # 0: the physical cores
    device_only: bool = False  # no model is looked for
    memory_only: bool = False  # of the device what it has free is wanted, for which CUDA need not be started
    tokenizer_mode: str = "auto"
    trust_remote_code: bool = False
    others: dict[str, Params] = {}  # models beside that one, by name: what can't be read of them is told, no error


def _unwatched(path: str) -> None:
    """For callers that do not need to know which model is being read."""


def probe(request: Request, reading: Callable[[str], None] = _unwatched) -> Facts:
    """`reading` is called before each model, with its model_dir. Raises ConfigInvalid, WeightsInvalid or
    NoUsableDevice."""
    if request.backend == "fake" or request.device_only:
        wanted = "cpu" if request.backend == "fake" else request.device
        return Facts(None, device_facts(wanted, request.threads, quick=request.memory_only))
    if request.model_dir is None:
        raise ConfigInvalid([Problem("model_dir", "is missing: which model shall be served?")])
    reading(request.model_dir)
    model = model_facts(
        request.model_dir,
        load_way=request.load_way,
        tokenizer_mode=request.tokenizer_mode,
        trust_remote_code=request.trust_remote_code,
        backend=request.backend,
    )
    others = {name: _other(params, request.backend, reading) for name, params in request.others.items()}
    return Facts(model=model, device=device_facts(request.device, request.threads), others=others)


def _other(params: Params, backend: str, reading: Callable[[str], None]) -> Other:
    model_dir = params.model_dir or ""
    reading(model_dir)
    try:
        facts = model_facts(
            model_dir,
            load_way=params.load_way,
            tokenizer_mode=params.tokenizer_mode,
            trust_remote_code=params.trust_remote_code,
            backend=backend,
        )
        return Other(params, facts)
    except ConfigInvalid as invalid:
        return Other(params, fault="; ".join(problem.message for problem in invalid.problems))
    except LightllmdError as error:
        return Other(params, fault=error.message)
