"""The api worker of a simulated supervisor: what it says and does, without HTTP."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lightllmd.config.plan import decode_plan
from lightllmd.ipc import messages

if TYPE_CHECKING:
    from supervisor.simulated_children import SimulatedProcess

_decode = lru_cache(maxsize=64)(decode_plan)
TIMED_OUT = 240  # ticks that an api worker holds a request for an engine


@dataclass
class Front:
    """A revision in an api worker."""

    in_flight: int = 0
    links: dict[int, int] = field(default_factory=dict)  # the generations that it is connected to, by replica
    held: int = 0  # ticks without one
    left: int = 0  # ticks until it is prepared


class Api:
    """As `lightllmd.api.worker` and `api.revisions`, with requests that are mere counts."""

    last_breath = 0
    memory = 0
    device = -1

    def __init__(self, process: SimulatedProcess) -> None:
        self.process = process
        self.configured: messages.ApiConfigure | None = None
        self.phase = "boot"
        self.fate = process.world.fate("api")
        self.left = process.world.duration()  # ticks until it is up
        self.overdue = False  # what is in the inbox was there a tick ago
        self.revision = 0
        self.fronts: dict[int, Front] = {}
        self.coming: dict[int, Front] = {}
        self.shut = self.refusing = self.retired = False
        self.gated = 0
        self.counts = Counter(ok=0, failed=0, cancelled=0, resumed=0)
        self.probes: list[messages.Probe] = []

    def __repr__(self) -> str:
        flights = {number: front.in_flight for number, front in self.fronts.items()}
        return f"{self.phase} r{self.revision} {flights} gated {self.gated}"

    # --- requests
    @property
    def accepts(self) -> bool:
        return self.phase == "ready" and not self.retired and not self.process.still

    @property
    def in_flight(self) -> int:
        return self.gated + sum(front.in_flight for front in self.fronts.values())

    def open(self) -> None:
        if self.refusing:
            return
        if self.shut:
            self.gated += 1
        else:
            self.fronts[self.revision].in_flight += 1

    def finishable(self) -> list[int]:
        """Revisions of which a request can get its last token."""
        ready = self.process.world.generation_is_ready
        return [
            number for number, front in self.fronts.items() if front.in_flight and any(map(ready, front.links.values()))
        ]

    def finish(self, revision: int) -> None:
        front = self.fronts[revision]
        front.in_flight -= 1
        self.counts["ok"] += 1
        world = self.process.world
        world.count_token(next(link for link in front.links.values() if world.generation_is_ready(link)))

    # --- life
    def work(self) -> None:
        if self.phase == "boot" and self.configured is not None:
            self.left -= 1
            if self._befalls("boot") or self.left > 0:
                return
            self._read_all()  # before the first connection is accepted
            self.phase = "ready"
        elif self.overdue:
            self._read_all()  # at most one heartbeat is sent with messages unread
        if self.process.still:
            return
        for number in list(self.coming):
            self.coming[number].left -= 1
            if self.coming[number].left > 0:
                continue
            if self._befalls("prepare"):
                return
            self.fronts[number] = self.coming.pop(number)
            self.process.say(messages.Prepared(number))
        self.probes = [probe for probe in self.probes if not self._answer(probe)]
        for front in self.fronts.values():
            front.held = front.held + 1 if front.in_flight and not front.links else 0
            if front.held > TIMED_OUT:
                self.counts["failed"] += front.in_flight
                front.in_flight = 0
        self.beat()
        self.overdue = self.process.link is not None and bool(self.process.link.down)
        if self.retired and not self.in_flight:
            self.process.die(0)

    def _read_all(self) -> None:
        while self.process.link is not None and self.process.link.down and self.process.alive:
            self.process.turn()

    def _befalls(self, phase: str) -> bool:
        if self.fate is None or self.fate.phase != phase:
            return False
        fate, self.fate = self.fate, None
        if fate.what in ("slow", "stall"):
            return True
        if phase == "prepare" and fate.what == "config":
            number, _ = self.coming.popitem()
            self.process.say(messages.Prepared(number, "no tokenizer, as ordered"))
        else:
            self.process.suffer(fate)
        return True

    def _answer(self, probe: messages.Probe) -> bool:
        front = self.fronts[self.revision]
        assert probe.generation is not None
        if probe.generation not in front.links.values():
            self.process.say(messages.Probed(probe.number, "no engine is ready"))
            return True
        if self.process.world.generation_is_ready(probe.generation):
            self.process.world.count_token(probe.generation)
            self.process.say(messages.Probed(probe.number))
            return True
        return False

    def beat(self) -> None:
        stats: dict[str, float] = {
            "in_flight": self.in_flight,
            "held": self.gated,
            "gated": self.gated,
            "draining": float(self.refusing),
            **self.counts,
            **{f"in_flight@{number}": front.in_flight for number, front in self.fronts.items()},
        }
        self.process.say(messages.Heartbeat(self.phase, 0, False, stats=stats))

    def hear(self, message: Any) -> None:
        world = self.process.world
        match message:
            case messages.ApiConfigure():
                self.configured, self.revision = message, message.revision
                self.fronts[message.revision] = Front()
            case messages.EngineUp():
                front = self.fronts.get(message.revision) or self.coming.get(message.revision)
                if front is not None:
                    front.links[message.replica] = message.generation
            case messages.EngineDown():
                front = self.fronts.get(message.revision) or self.coming.get(message.revision)
                if front is not None:
                    front.links = {k: link for k, link in front.links.items() if link != message.generation}
            case messages.Prepare():
                if message.revision in self.fronts:
                    self.process.say(messages.Prepared(message.revision))
                elif _decode(message.plan).config.params.model_dir == "/models/untokenized":
                    self.process.say(messages.Prepared(message.revision, "it has no tokenizer"))
                else:
                    self.coming.setdefault(message.revision, Front(left=world.duration()))
            case messages.Commit():
                self._commit(message)
            case messages.Forget():
                if message.revision == self.revision:
                    world.violated(f"{self.process} is to forget revision {message.revision}, which is in force")
                    return
                self.coming.pop(message.revision, None)
                front = self.fronts.pop(message.revision, None)
                if front is not None and front.in_flight and not world.may_end(message.revision):
                    world.violated(
                        f"{self.process}: {front.in_flight} requests of revision {message.revision} forgotten"
                    )
                self.beat()
            case messages.Cut():
                if message.revision in self.fronts:
                    self.counts["cancelled"] += self.fronts[message.revision].in_flight
                    self.fronts[message.revision].in_flight = 0
            case messages.Hold():
                self.shut = True
                self.beat()
            case messages.Release():
                self.shut = False
                self.fronts[self.revision].in_flight += self.gated
                self.gated = 0
            case messages.Drain():
                self.refusing, self.gated = True, 0
                self.beat()
            case messages.Resume():
                self.refusing = False
                self.beat()
            case messages.Probe():
                self.probes.append(message)
            case messages.Retire():
                self.retired = True
            case messages.Stop():
                self.process.die(0)

    def _commit(self, message: messages.Commit) -> None:
        if message.revision not in self.fronts:
            self.process.world.violated(f"{self.process} is to commit revision {message.revision} unprepared")
            return
        before, self.revision = self.fronts[self.revision], message.revision
        if message.carry:
            self.fronts[self.revision].in_flight += before.in_flight
            before.in_flight = 0
        self.beat()
