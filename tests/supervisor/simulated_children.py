"""Children of a supervisor as objects: what api workers, engines and probes say and do, without a process.

Each has an inbox and an outbox; nothing happens in it but by `turn` (it reads what it was told), `work` (it gets on
with what it does) and signals. Times are in ticks of the simulation.
"""

from __future__ import annotations

import itertools
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import msgspec

from lightllmd.config.plan import Facts, Plan, decode_plan
from lightllmd.errors import EXIT_CONFIG, EXIT_NO_DEVICE, EXIT_OUT_OF_MEMORY, EXIT_RANK_GONE
from lightllmd.ipc import messages
from supervisor.simulated_api import Api

KEPT_ASLEEP = 700 << 20  # bytes of the device that a sleeping engine still has
CONTEXT = 500 << 20  # and one that has a context and nothing else
_EXITS = {"config": EXIT_CONFIG, "weights": EXIT_CONFIG, "device": EXIT_NO_DEVICE, "memory": EXIT_OUT_OF_MEMORY}
_decode = lru_cache(maxsize=64)(decode_plan)


@dataclass(frozen=True)
class Fate:
    """What befalls a child when it enters a phase ("configure", "probe", "prepare": a probe's or api worker's own).

    `what`: a kind of `Failed`; "exit" (1, without a word), "fault" (SIGSEGV), "hang", "slow" (with progress), "stall"
    (without, but not for ever).
    """

    phase: str
    what: str


class World(Protocol):
    """What children see of the rest."""

    def facts(self, request: dict[str, Any]) -> Facts | str: ...

    def may_end(self, revision: int) -> bool: ...

    def is_lost(self, device: int) -> bool: ...

    def memory_short(self, process: SimulatedProcess) -> bool: ...

    def context_made(self, process: SimulatedProcess) -> None: ...

    def generation_is_ready(self, generation: int) -> bool: ...

    def count_token(self, generation: int) -> None: ...

    def ranks(self, generation: int) -> list[Engine]: ...

    def violated(self, what: str) -> None: ...

    def told(self, process: SimulatedProcess, message: Any) -> None: ...

    def fate(self, kind: str) -> Fate | None: ...

    def duration(self) -> int: ...

    def died(self, process: SimulatedProcess) -> None: ...


BUFFERED = 8  # messages that a child's socket takes while it reads none


class Link:
    """Stands for `ipc.channel.Channel`, with the child's end in it."""

    _numbers = itertools.count(100_000)

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self.process: SimulatedProcess | None = None
        self.down: deque[Any] = deque()
        self.up: deque[Any] = deque()
        self.their_end = True  # is open
        self.closed = False
        self.pending = False

    # --- the supervisor's end
    def fileno(self) -> int:
        return self.number

    def send(self, message: Any, *, droppable: bool = False) -> bool:
        if not self.their_end or self.process is None or (droppable and len(self.down) >= BUFFERED):
            return False
        self.process.world.told(self.process, message)
        self.down.append(message)
        return True

    def receive(self) -> Iterator[Any]:
        while self.up:
            yield self.up.popleft()
        self.closed = self.closed or not self.their_end

    def close(self) -> None:
        self.closed = True

    @property
    def readable(self) -> bool:
        return not self.closed and (bool(self.up) or not self.their_end)


class TheirEnd:
    """What the supervisor hands to the child."""

    def __init__(self, link: Link) -> None:
        self.link = link

    def fileno(self) -> int:
        return self.link.number

    def close(self) -> None:
        pass


class SimulatedProcess:
    """Stands for `supervisor.process.Process`."""

    _pids = itertools.count(10_000_000)  # no pid of Linux is that large

    def __init__(
        self,
        world: World,
        links: dict[int, Link],
        command: Sequence[str],
        *,
        on_exit: Callable[[], None],
        on_output: Callable[[str], None],
        pass_fds: Sequence[int] = (),
        stdin: bytes | None = None,
        capture: bool = False,
        tied: bool = False,
    ) -> None:
        self.world = world
        self.pid = next(self._pids)
        self.kind = command[0]
        self.on_exit, self.on_output = on_exit, on_output
        self.captured: bytearray | None = bytearray() if capture else None
        self.returncode: int | None = None  # None: lives, or is being taken down
        self.code: int | None = None  # what it will be
        self.taken_down = 0  # ticks that the kernel still takes for that
        self.exit_seen = self.reaped = self.disposed = False
        self.stopped = self.hung = False  # by SIGSTOP; by itself
        self.killed = False  # by the supervisor
        self.link: Link | None = None
        self.ledger: list[Any] = []  # all that it was told
        self.program: Api | Engine | Probe | Push | Reader
        if self.kind == "probe":
            self.program = Probe(self, msgspec.json.decode(stdin or b"{}"))
        elif self.kind == "reader":
            self.program = Reader(self)
        else:
            self.link = links[int(command[1])]
            self.link.process = self
            kinds: dict[str, Callable[[], Api | Engine | Push]] = {
                "api": lambda: Api(self),
                "engine": lambda: Engine(self, command[2:]),
                "push": lambda: Push(self),
            }
            self.program = kinds[self.kind]()

    # --- as the supervisor sees it
    def reap(self) -> int | None:
        self.reaped = self.reaped or self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.code is not None:
            return
        self.killed = self.killed or number == signal.SIGKILL
        if number == signal.SIGKILL or not self.stopped:
            self.die(-number)

    def dispose(self) -> None:
        if self.returncode is None:
            self.world.violated(f"{self} was let go of alive")
        self.disposed = True

    # --- as it is
    @property
    def alive(self) -> bool:
        return self.code is None

    @property
    def still(self) -> bool:
        return self.stopped or self.hung or not self.alive

    def die(self, code: int) -> None:
        self.code = code
        self.taken_down = self.program.last_breath
        if self.link is not None:
            self.link.their_end = False
            self.link.down.clear()
        if not self.taken_down:
            self.gone()

    def gone(self) -> None:
        self.returncode = self.code
        self.program.memory = 0
        self.world.died(self)

    def say(self, message: Any) -> None:
        if self.link is not None:
            self.link.up.append(message)

    def turn(self) -> None:
        """Reads the next message."""
        assert self.link is not None
        self.program.hear(self.link.down.popleft())

    def tick(self) -> None:
        if self.code is not None and self.returncode is None:
            self.taken_down -= 1
            if self.taken_down <= 0:
                self.gone()
        elif not self.still:
            self.program.work()

    def suffer(self, fate: Fate) -> None:
        self.on_output(f"{fate.what} in {fate.phase}")
        match fate.what:
            case "hang":
                self.hung = True
            case "exit":
                self.die(1)
            case "fault":
                self.die(-signal.SIGSEGV)
            case kind:
                self.say(messages.Failed(kind, f"{kind} as ordered"))
                self.die(_EXITS[kind])

    def __repr__(self) -> str:
        return f"<{self.kind} {self.pid} {self.program}>"


class Engine:
    """As `lightllmd.engine.worker` and its followers; what it holds of its device counts from its load on. A spare one
    has something to do `early`; the context that it makes counts at once. No rank goes on to the next phase before all
    have done their work in the present one; one that misses another waits for it, or ends."""

    AFTER = {"boot": "load", "load": "warmup", "warmup": "ready", "sleep": "asleep"}

    def __init__(self, process: SimulatedProcess, early: Sequence[str]) -> None:
        self.process = process
        self.early = early
        self.configured: messages.EngineConfigure | None = None
        self.plan: Plan | None = None
        self.device = 0
        self.phase = "boot"
        self.progress = 0
        self.left = 1  # units of work in this phase
        self.phases = 0  # that it has entered
        self.fate = process.world.fate("engine")
        self.memory = 0
        self.tokens = 0
        self.pending: list[Any] = []

    @property
    def last_breath(self) -> int:
        return self.process.world.duration() if self.memory else 0

    def __repr__(self) -> str:
        if self.configured is None:
            return f"{self.phase} g-"
        return f"{self.phase} g{self.configured.generation}.{self.configured.rank}"

    @property
    def group(self) -> list[Engine]:
        """All ranks of its generation, itself included, of which some may be dead."""
        assert self.configured is not None
        return self.process.world.ranks(self.configured.generation)

    @property
    def leads(self) -> bool:
        return self.configured is not None and self.configured.rank == 0

    @property
    def ready(self) -> bool:
        return self.phase == "ready" and not self.process.still

    def enter(self, phase: str) -> None:
        self.phase, self.progress, self.left = phase, 0, self.process.world.duration()
        self.phases += 1
        assert self.plan is not None
        if phase == "load":
            self.memory = self.plan.budget.taken
        elif phase == "asleep":
            self.memory = KEPT_ASLEEP
        self.beat()
        what = self._inherent()
        if phase == "load" and self.process.world.memory_short(self.process):
            what = "memory"
        if phase == "load" and self.process.world.is_lost(self.device):
            what = "device"
        if self.fate is not None and self.fate.phase == phase:
            fate, self.fate = self.fate, None
            what = fate.what
        if what == "slow":
            self.left = 8
        elif what == "stall":
            self.left = 3
        elif what:
            self.process.suffer(Fate(phase, what))

    def _inherent(self) -> str:
        assert self.plan is not None
        faults = {("/models/broken", "load"): "weights", ("/models/crashing", "warmup"): "fault"}
        faults[("/models/hanging", "load")] = "hang"
        return faults.get((self.plan.config.params.model_dir or "", self.phase), "")

    def work(self) -> None:
        if self.plan is None:
            self._begin()
            return
        assert self.configured is not None
        group = self.group
        missing = len(group) < self.configured.ranks or not all(one.process.alive for one in group)
        if missing and self.phase != "boot" and self.process.world.duration() == 1:
            self.process.die(EXIT_RANK_GONE)
            return
        if self.phase in self.AFTER:
            if self.left > 0:
                self.left -= 1
                self.progress += 1
            done = [one.phases > self.phases or (one.phases == self.phases and one.left <= 0) for one in group]
            if all(done) and not missing:
                self.enter(self.AFTER[self.phase])
                return
        if self.phase in ("ready", "asleep"):
            self._obey_pending()
        if not self.process.still:
            self.beat()

    def _begin(self) -> None:
        if not self.early:
            return
        if self.early[-1].startswith("cuda"):
            self.device = int(self.early[-1].removeprefix("cuda:"))
            self.memory = CONTEXT
            self.process.world.context_made(self.process)
        self.early = ()
        self.beat()

    def beat(self) -> None:
        stats: dict[str, float] = {"tokens_out": self.tokens, "slots_total": 100}
        if self.phase in ("ready", "sleep", "asleep"):
            stats["memory_used"] = max(self.memory - KEPT_ASLEEP, 0)
        busy = self.phase not in ("ready", "asleep")
        self.process.say(messages.Heartbeat(self.phase, self.progress, busy, 100, stats))

    def hear(self, message: Any) -> None:
        if isinstance(message, messages.EngineConfigure):
            self.configured, self.plan, self.device = message, _decode(message.plan), message.device
            self.enter("boot")
        elif isinstance(message, messages.Stop):
            self.process.die(0)
        elif not self.leads and not isinstance(message, messages.Tune):
            self.process.world.violated(f"{self.process} was told {message}, which is for its leader")
        else:
            self.pending.append(message)
            if self.phase in ("ready", "asleep"):
                self._obey_pending()

    def _obey_pending(self) -> None:
        """Only between steps of its work."""
        pending, self.pending = self.pending, []
        for message in pending:
            match message:
                case messages.Sleep() if self.phase == "ready":
                    self._enter_all("sleep")
                case messages.Wake() if self.phase == "asleep":
                    self._enter_all("load")

    def _enter_all(self, phase: str) -> None:
        """The leader passes it on; who doesn't read it now, doesn't do it."""
        for one in self.group:
            if not one.process.still:
                one.enter(phase)


class Probe:
    """As `lightllmd.probe`."""

    last_breath = 0
    memory = 0
    device = -1
    configured = True

    def __init__(self, process: SimulatedProcess, request: dict[str, Any]) -> None:
        self.process, self.request = process, request
        self.fate = process.world.fate("probe")

    def __repr__(self) -> str:
        return str(self.request)

    def work(self) -> None:
        fate, self.fate = self.fate, None
        if fate is not None and fate.what in ("slow", "stall"):
            return
        if fate is not None:
            self._suffer(fate)
            return
        answer = self.process.world.facts(self.request)
        assert self.process.captured is not None
        if isinstance(answer, str):
            problem = {"key": "model_dir", "message": answer, "file": None, "line": None}
            self.process.captured += msgspec.json.encode({"problems": [problem]})
            self.process.die(EXIT_CONFIG)
        else:
            self.process.captured += msgspec.json.encode(answer)
            self.process.die(0)

    def _suffer(self, fate: Fate) -> None:
        if fate.what == "hang":
            self.process.hung = True
        elif fate.what == "fault":
            self.process.die(-signal.SIGSEGV)
        else:
            self.process.on_output(f"{fate.what} as ordered")
            self.process.die(_EXITS.get(fate.what, 1))

    def hear(self, message: Any) -> None:
        raise TypeError(f"a probe has no channel: {message}")


class Reader:
    """As `lightllmd.weights.read_ahead`."""

    last_breath = 0
    memory = 0
    device = -1
    configured = True

    def __init__(self, process: SimulatedProcess) -> None:
        self.process = process
        self.left = 4

    def work(self) -> None:
        self.left -= 1
        if not self.left:
            self.process.die(0)

    def hear(self, message: Any) -> None:
        raise TypeError(f"a reader has no channel: {message}")


class Push:
    """As `lightllmd.push`; a last push takes a while."""

    last_breath = 0
    memory = 0
    device = -1

    def __init__(self, process: SimulatedProcess) -> None:
        self.process = process
        self.configured: messages.PushConfigure | None = None
        self.phase = "boot"
        self.left = process.world.duration()
        self.stopping = False
        self.fate = process.world.fate("push")

    def __repr__(self) -> str:
        return self.phase

    def work(self) -> None:
        if self.configured is None:
            return
        self.left -= 1
        if self.left <= 0 and self.stopping:
            self.process.die(0)
            return
        fate, self.fate = self.fate, None
        if fate is not None and fate.what not in ("slow", "stall"):
            self.process.suffer(fate)
            return
        if self.left <= 0:
            self.phase = "ready"
        self.process.say(messages.Heartbeat(self.phase, 0, busy=False))

    def hear(self, message: Any) -> None:
        match message:
            case messages.PushConfigure():
                self.configured = message
            case messages.Stop():
                self.stopping, self.left = True, self.process.world.duration()
            case messages.PushTarget() | messages.Tune():
                pass
            case _:
                self.process.world.violated(f"{self.process} was told {message}")
