"""Which devices a plan uses, and how many processes on each: tensor-parallel ranks, and replicas of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lightllmd.config.parameters import Config
from lightllmd.config.plan import Device, DeviceFacts


@dataclass(frozen=True)
class Groups:
    """`replicas` groups of `ranks` processes; each computes on a device of its own, or all on one CPU."""

    ranks: int
    replicas: int
    devices: list[Device]  # of replica r's rank k the one at ``r * ranks + k``; none on a CPU


def groups_of(facts: DeviceFacts, ranks: int, replicas: int) -> Groups:
    """The first devices that can be used. There have to be enough (`too_few`)."""
    usable = facts.usable
    if facts.kind == "cpu":
        return Groups(ranks, replicas, [])
    return Groups(ranks, replicas, usable[: ranks * replicas])


def too_few(config: Config, facts: DeviceFacts) -> Iterator[tuple[str, str]]:
    """(key, message) where there are fewer devices than are asked for; a CPU takes any number of ranks."""
    tp, replicas, count = config.params.tp, config.engine.replicas, len(facts.usable)
    if facts.kind == "cpu" or tp * replicas <= count:
        return
    found = f"{count} usable GPU{'' if count == 1 else 's'}{_unusable(facts)}"
    if tp > count:
        yield "tp", f"tp = {tp} needs {tp} GPUs, and there {_be(count)} {found}; at most tp = {count} can be had"
        return
    yield (
        "engine.replicas",
        f"engine.replicas = {replicas} of tp = {tp} need {tp * replicas} GPUs, and there {_be(count)} {found}; "
        f"at most engine.replicas = {count // tp} can be had, or tp = {count // replicas}"
        if count >= replicas
        else f"engine.replicas = {replicas} of tp = {tp} need {tp * replicas} GPUs, and there {_be(count)} {found}; "
        f"at most engine.replicas = {count // tp} can be had",
    )


def _be(count: int) -> str:
    return "is" if count == 1 else "are"


def _unusable(facts: DeviceFacts) -> str:
    """Those that are there and can't be used, by name."""
    named = [f"GPU {device.index} ({device.fault})" for device in facts.devices if device.fault]
    return f", beside {', '.join(named)}" if named else ""
