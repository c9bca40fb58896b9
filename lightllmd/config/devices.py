"""Which devices a plan uses, and how many processes on each: tensor-parallel ranks, and replicas of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lightllmd.config.amount import size
from lightllmd.config.parameters import Config
from lightllmd.config.plan import Device, DeviceFacts

# What is called different: devices of one kind differ by some MB that other programs have there.
IMBALANCE = 0.03


@dataclass(frozen=True)
class Groups:
    """`replicas` groups of `ranks` processes; each computes on a device of its own, or all on one CPU."""

    ranks: int
    replicas: int
    devices: list[Device]  # of replica r's rank k the one at ``r * ranks + k``; none on a CPU
    lost: list[str] = field(default_factory=list)  # of what was asked for, where there are too few devices

    @property
    def processes(self) -> int:
        """All told."""
        return self.ranks * self.replicas


def groups_of(facts: DeviceFacts, ranks: int, replicas: int) -> Groups:
    """On the first devices that can be used. There have to be enough (`too_few`)."""
    return Groups(ranks, replicas, [] if facts.kind == "cpu" else facts.usable[: ranks * replicas])


def asked_for(config: Config) -> tuple[int, int]:
    """tp and replicas."""
    return config.params.tp, config.engine.replicas


def too_few(config: Config, facts: DeviceFacts) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys, message) where there are fewer devices than are asked for; a CPU takes any number of ranks."""
    (tp, replicas), count = asked_for(config), len(facts.usable)
    if facts.kind == "cpu" or tp * replicas <= count:
        return
    there = f"there {'is' if count == 1 else 'are'} {_usable(facts)}"
    if replicas == 1:
        yield ("tp",), f"tp = {tp} needs {tp} GPUs, and {there}; tp = {count} is the most that fits"
    elif tp == 1:
        yield (
            ("engine.replicas",),
            f"engine.replicas = {replicas} needs {replicas} GPUs, and {there}; engine.replicas = {count} is the most "
            "that fits",
        )
    else:
        fit = [f"tp = {count // replicas}"] if count >= replicas else []
        fit += [f"engine.replicas = {count // tp}"] if count >= tp else []
        fit = fit or [f"engine.replicas = 1 with tp = {count}"]
        yield (
            ("tp", "engine.replicas"),
            f"engine.replicas = {replicas} of tp = {tp} need {replicas * tp} GPUs, and {there}; {' or '.join(fit)} is "
            "the most that fits",
        )


def degraded(config: Config, facts: DeviceFacts, shares: Callable[[int], bool]) -> Groups | None:
    """What can be had of what is asked for: as many replicas as there are devices for, else one, over as many ranks as
    `shares` says can share the model; None where that is none."""
    (tp, replicas), count = asked_for(config), len(facts.usable)
    ranks = tp if tp <= count else next((ranks for ranks in range(count, 0, -1) if shares(ranks)), 0)
    if not ranks:
        return None
    left = min(replicas, count // ranks) if ranks == tp else 1
    lost = []
    if ranks < tp:
        lost.append(f"the model is cut over {ranks} instead of tp = {tp}")
    if left < replicas:
        lost.append(f"{left} of engine.replicas = {replicas} {'is' if left == 1 else 'are'} served")
    said = f"engine.degrade: of {tp * replicas} GPUs that are asked for there {'is' if count == 1 else 'are'} "
    made = groups_of(facts, ranks, left)
    return Groups(ranks, left, made.devices, [f"{said}{_usable(facts)}: {' and '.join(lost)}"])


def unlike(devices: list[Device]) -> str:
    """In words, where these are of different kinds; else nothing."""
    names = list(dict.fromkeys(device.name for device in devices))
    return f"{' and '.join(names)} compute together, at the pace of the slower" if len(names) > 1 else ""


def imbalance(devices: list[Device]) -> str:
    """In words, where some of these have clearly less free than others; else nothing."""
    if len(devices) < 2:
        return ""
    scarcest, roomiest = (pick(devices, key=lambda one: one.memory_free) for pick in (min, max))
    if roomiest.memory_free * (1 - IMBALANCE) <= scarcest.memory_free:
        return ""
    less = 1 - scarcest.memory_free / roomiest.memory_free
    return (
        f"{scarcest.title} has {size(scarcest.memory_free)} free, {less:.0%} less than {roomiest.title} with "
        f"{size(roomiest.memory_free)}: it limits the KV cache of all"
    )


def _usable(facts: DeviceFacts) -> str:
    """How many there are, and by name those that can't be used."""
    count = len(facts.usable)
    faulty = [f"{device.title}: {device.fault}" for device in facts.devices if device.fault]
    return f"{count} usable GPU{'' if count == 1 else 's'}" + (f" ({'; '.join(faulty)})" if faulty else "")
