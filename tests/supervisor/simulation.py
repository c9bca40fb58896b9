"""The real supervisor in a world of objects: virtual time, children that are no processes, and every event delivered
when the simulation says so.

`Simulation` runs `Supervisor.run` on an event loop of its own. What may happen next are its `moves`: a child reads a
message, the supervisor hears a child or of its death, a thread ends. Within a tick they happen in any order; before the
next one all of them have happened.
"""

from __future__ import annotations

import os
import random
import re
import signal
import tempfile
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec

from lightllmd.config import resolve
from lightllmd.config.cli import Invocation
from lightllmd.config.parameters import Config, Params
from lightllmd.config.plan import Device, DeviceFacts, Facts, Other
from lightllmd.errors import ConfigInvalid, LightllmdError, Problem, SystemFailure
from lightllmd.ipc import messages
from lightllmd.supervisor import supervisor
from lightllmd.supervisor.change.settings import Settings
from lightllmd.supervisor.children import child, probing, read_ahead
from lightllmd.supervisor.children.child import Child
from lightllmd.supervisor.children.hang_rule import RunningClock
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.control.jobs import RunningJob
from lightllmd.supervisor.host import listeners as sockets
from lightllmd.supervisor.host.fd_store import FdStore
from lightllmd.supervisor.host.runtime_directory import RuntimeDirectory
from lightllmd.supervisor.journal import logs
from lightllmd.supervisor.workers import memory_gate as memory
from lightllmd.supervisor.workers import ranks, spare
from supervisor.simulated_api import Api
from supervisor.simulated_children import Engine, Fate, Link, SimulatedProcess, TheirEnd
from supervisor.simulated_host import Listener, Loop, NoControlServer, SimulatedCommands, Systemd
from supervisor.simulated_models import model_facts

TICK = 0.5  # virtual seconds; the most that one turn of the supervisor counts
DEVICE = 10 * 10**9  # bytes, of each
DEVICES = 3


class Simulation:
    """`file`: what the configuration file says; None: something invalid. `traffic`: how probable a request is, in each
    tick and at each api worker. `pace`: how long children take, in ticks, and when requests come and end.
    `readable_others`: paths of models whose headers the probe can read beside those of the one it is asked for."""

    def __init__(
        self, config: Config, traffic: float = 0.0, pace: int = 0, readable_others: Sequence[str] = ()
    ) -> None:
        self.readable_others = readable_others
        self.traffic, self.pace = traffic, random.Random(pace)
        self.measured = True  # no probe has failed: the supervisor knew what memory is free
        self.loop = Loop()
        self.loop.set_exception_handler(lambda _, told: self.violated(f"{told['message']}: {told.get('exception')!r}"))
        self.links: dict[int, Link] = {}
        self.processes: list[SimulatedProcess] = []
        # By generation and rank, of those that could be told their configuration.
        self.members: defaultdict[int, dict[int, SimulatedProcess]] = defaultdict(dict)
        self.lost: set[int] = set()  # devices that are gone
        self.listeners: list[Listener] = []
        self.fates: dict[str, deque[Fate]] = {"api": deque(), "engine": deque(), "probe": deque(), "push": deque()}
        self.violations: list[str] = []
        self.file: Config | None = config
        self.stopping = False  # it was told to, or gave up
        self.sigchld = False
        self.refuse_spawns = 0  # by the host, of the next ones
        self.refuse_ports = False
        self.permanently_failed: set[int] = set()  # revisions that were given up because their engine can't be started
        self.forced = self.kept = False  # a swap was asked for that may end requests, or serve what fails
        self._patches = ExitStack()
        folder = self._patches.enter_context(tempfile.TemporaryDirectory(prefix="sim-"))
        self._patch()
        self.systemd = Systemd()
        log = logs.LogBook(400, "debug", logs.renderer("text", False), None)
        self.context = Context(
            config=config,
            clock=RunningClock(self.loop.time),
            log=log,
            events=logs.EventBook(log),
            runtime=RuntimeDirectory(Path(folder) / "control.sock"),
            commands=SimulatedCommands(),
            listeners=[Listener(self.listeners, 8000)],  # type: ignore[list-item]
            fd_store=FdStore(self.systemd),
            random=random.Random(0),
        )
        self.context.fd_store.keep(self.context.listeners)
        self.settings = Settings(Invocation(config, "lightllmd.toml"))
        self.settings.reread = self._reread  # type: ignore[method-assign]
        self.settings.look = self._look  # type: ignore[method-assign]  # no thread
        self.context.config = self.settings.effective
        self.supervisor = supervisor.Supervisor(self.context, self.settings, self.systemd)
        self.task = self.loop.create_task(self.supervisor.run())
        self.settle()

    def close(self) -> None:
        for steps in self.supervisor.verbs._steps.values():
            steps.close()
        self.task.cancel()
        self.supervisor.children = list  # type: ignore[method-assign]  # it need not wait for any
        for _ in range(100):
            self.settle()
            for move in self.moves():
                move()
            if self.task.done():
                break
        for engine in self.supervisor.engines:
            for process in engine.generation.ranks if engine.generation else ():
                os.close(process.flight)
        for process in self.supervisor.engines.spares._processes:
            os.close(process.flight)
        self.context.runtime.close()
        self._patches.close()
        self.loop.close()

    def _patch(self) -> None:
        replace = lambda where, name, what: self._patches.enter_context(mock.patch.object(where, name, what))  # noqa: E731
        replace(child, "Process", self._spawn)
        replace(probing, "Process", self._spawn)
        replace(read_ahead, "Process", self._spawn)
        replace(child.channel, "pair", self._pair)
        replace(supervisor, "TICK", TICK)
        replace(supervisor, "resident", lambda pid: 1)
        replace(supervisor, "is_stopped", self._is_stopped)
        replace(spare, "is_stopped", self._is_stopped)
        replace(ranks, "is_stopped", self._is_stopped)
        replace(supervisor.orphans, "become_subreaper", lambda: None)
        replace(supervisor.orphans, "reap_orphans", self._reap)
        replace(supervisor.server, "ControlServer", NoControlServer)
        replace(resolve, "shares", lambda *_: "")  # words of the report, which take a while
        replace(memory, "available_memory", lambda: DEVICE)
        replace(sockets, "bind", self._bind)

    async def _look(self, context: Context, stamps: object) -> None:
        """Nothing is pending: no thread's time can be simulated."""

    # --- what the supervisor finds instead of the host's ------------------------------------------------------------
    def _pair(self) -> tuple[Link, TheirEnd]:
        link = Link()
        self.links[link.number] = link
        return link, TheirEnd(link)

    def _spawn(self, command: Sequence[str], **options: Any) -> SimulatedProcess:
        if self.refuse_spawns:
            self.refuse_spawns -= 1
            self.measured = False
            raise SystemFailure(f"can't start {command[0]}: as ordered")
        process = SimulatedProcess(self, self.links, command, **options)
        self.processes.append(process)
        return process

    def _bind(
        self, host: str, port: int, kept: Sequence[Any] = (), patience: float = 0.0, **_: Any
    ) -> list[Listener | Any]:
        fitting = [listener for listener in kept if listener.port == port]
        if self.refuse_ports and not fitting:
            raise SystemFailure(f"{host}:{port} is in use by somebody else")
        return fitting or [Listener(self.listeners, port)]

    def _reread(self) -> Config:
        if self.file is None:
            raise ConfigInvalid([Problem("", "not TOML", "lightllmd.toml", 1)])
        return self.file

    def _reap(self, reap_known: Callable[[int], bool]) -> list[int]:
        for process in self.processes:
            if process.returncode is not None and not process.reaped and not reap_known(process.pid):
                self.violated(f"{process} died and nobody owns it")
        return []

    def _is_stopped(self, pid: int) -> bool:
        return any(process.stopped for process in self.processes if process.pid == pid)

    # --- what children find -----------------------------------------------------------------------------------------
    def facts(self, request: dict[str, Any]) -> Facts | str:
        free = [max(DEVICE - self.taken(index), 0) for index in range(DEVICES)]
        devices = [
            Device(
                index,
                "Simulated GPU",
                DEVICE,
                free[index],
                uuid=f"GPU-{index}",
                fast_dtypes=["bfloat16"],
                fault="GPU is lost" if index in self.lost else "",
            )
            for index in range(DEVICES)
        ]
        usable = DEVICES - len(self.lost)
        device = DeviceFacts("cuda", "Simulated GPU", usable, DEVICE, min(free), ["bfloat16"], 4, devices=devices)
        path = request.get("model_dir", "")
        if path == "/models/missing":
            return f"{path} does not exist"
        others = {name: self._other(params) for name, params in request.get("others", {}).items()}
        return Facts(None if request.get("device_only") else model_facts(path), device, others)

    def _other(self, told: dict[str, Any]) -> Other:
        params = msgspec.convert(told, Params)
        path = params.model_dir or ""
        if path in self.readable_others:
            return Other(params, model_facts(path))
        return Other(params, fault=f"{path} can't be read")

    def taken(self, device: int) -> int:
        """Bytes of that device."""
        return sum(one.program.memory for one in self.processes if one.program.device == device)

    def may_end(self, revision: int) -> bool:
        """Whether requests of it may be ended: nobody could finish them, or the daemon stops."""
        return self.stopping or revision in self.permanently_failed

    def is_lost(self, device: int) -> bool:
        return device in self.lost

    def memory_short(self, process: SimulatedProcess) -> bool:
        """As `process` begins to load."""
        device = process.program.device
        taken = self.taken(device)
        dying = sum(one.program.memory for one in self.processes if one.program.device == device and not one.alive)
        if taken > DEVICE >= taken - dying and self.measured:
            self.violated(f"{process} does not wait for memory that is about to be free")
        return taken > DEVICE

    def context_made(self, process: SimulatedProcess) -> None:
        """By a spare engine."""
        taken = self.taken(process.program.device)
        if taken > DEVICE and self.measured:
            self.violated(f"{process} takes {taken - DEVICE} bytes that the plan in force has given away")

    def duration(self) -> int:
        """Of something that a child does, in ticks."""
        return self.pace.choice((1, 1, 2, 3))

    def engine(self, generation: int) -> Engine | None:
        """The one that leads it."""
        return next((engine for engine in self.ranks(generation) if engine.leads), None)

    def ranks(self, generation: int) -> list[Engine]:
        """Those that have read their configuration."""
        return [
            process.program
            for process in self.processes
            if isinstance(process.program, Engine) and _generation(process.program) == generation
        ]

    def generation_is_ready(self, generation: int) -> bool:
        engine = self.engine(generation)
        return engine is not None and engine.ready

    def count_token(self, generation: int) -> None:
        engine = self.engine(generation)
        assert engine is not None
        engine.tokens += 1

    def fate(self, kind: str) -> Fate | None:
        fate = self.fates[kind].popleft() if self.fates[kind] else None
        self.measured = self.measured and (kind != "probe" or fate is None)
        return fate

    def died(self, process: SimulatedProcess) -> None:
        self.sigchld = True

    def violated(self, what: str) -> None:
        self.violations.append(what)

    def told(self, process: SimulatedProcess, message: Any) -> None:
        """Before it is sent."""
        messages.encode(message)
        program = process.program
        if isinstance(program, Engine) and isinstance(message, messages.EngineConfigure):
            last = max((g for p in self.engines() if (g := _generation(p.program)) is not None), default=0)
            self.members[message.generation][message.rank] = process
            if message.generation < last or (message.generation == last and message.rank == 0):
                self.violated(f"generation {message.generation} follows {last}")
        if isinstance(message, messages.Forget):
            engines = [engine for engine in self.supervisor.engines if engine.revision == message.revision]
            if any(engine.worker.fatal is not None for engine in engines):
                self.permanently_failed.add(message.revision)
        if isinstance(message, messages.Cut) and not self.forced:
            self.violated("requests are ended that nobody asked to end")
        if isinstance(message, messages.EngineDown) and (fault := self._misnamed(message)):
            self.violated(fault)
        if isinstance(message, messages.Commit) and not self.kept:
            serving = [engine.child for engine in self.supervisor.engines.serving.engines]
            if not any(child is not None and child.ready_at is not None for child in serving):
                self.violated(f"revision {message.revision} is committed unproven")
        process.ledger.append(message)

    def _misnamed(self, down: messages.EngineDown) -> str:
        """Whether it is said of the wrong rank that it ended first."""
        named = re.match(r"rank (\d+) \(pid (\d+)\): (hung)?", down.cause)
        if named is None:
            return ""
        culprit = self.members[down.generation].get(int(named[1]))
        if culprit is None:
            return ""
        group = list(self.members[down.generation].values())
        if culprit.pid != int(named[2]):
            return f"{down} names none of {group}"
        if named[3] is None and culprit.killed and not culprit.stopped and any(not one.killed for one in group):
            return f"{down}: it was killed because of another of {group}"
        if named[3] and not culprit.still and any(one.alive and one.still for one in group):
            return f"{down}: it waited for another of {group}"
        return ""

    # --- time and events ----------------------------------------------------------------------------------------------
    def settle(self) -> None:
        """The supervisor does all that it can without something happening."""
        if not self.loop.is_closed():
            self.loop.run_forever()
        self.stopping = self.stopping or self.supervisor.verbs.stopping is not None

    def moves(self) -> list[Callable[[], object]]:
        """What can happen next, in a fixed order."""
        found: list[Callable[[], object]] = []
        for process in self.processes:
            link = process.link
            if link is not None:
                if link.down and not process.still:
                    found.append(process.turn)
                if link.readable and link.number in self.loop.readers:
                    found.append(self.loop.readers[link.number])
            if process.returncode is not None and not process.exit_seen and not process.disposed:
                found.append(partial(self._exit, process))
        if self.sigchld and signal.SIGCHLD in self.loop.signals:
            found.append(self._signal_death)
        if self.loop.threads:
            found.append(lambda: self.loop.threads.pop(0)())
        return found

    def _exit(self, process: SimulatedProcess) -> None:
        process.exit_seen = True
        process.on_exit()

    def _signal_death(self) -> None:
        self.sigchld = False
        self.loop.signals[signal.SIGCHLD]()

    def happen(self, choice: int, at_once: int = 1) -> None:
        """One of the moves; `at_once`: several before the supervisor has a turn."""
        for _ in range(at_once):
            if moves := self.moves():
                moves[choice % len(moves)]()
        self.settle()

    def flush(self, order: random.Random) -> None:
        """Everything that can happen without time passing happens."""
        while moves := self.moves():
            moves[order.randrange(len(moves))]()
            if order.random() < 0.8:
                self.settle()
        self.settle()

    def tick(self, order: random.Random) -> None:
        self.flush(order)
        for process in list(self.processes):
            process.tick()
            if isinstance(process.program, Api) and process.program.accepts:
                self._serve(process.program)
        self.loop.now += TICK
        self.settle()
        self.processes = [process for process in self.processes if not (process.disposed and process.reaped)]

    def _serve(self, api: Api) -> None:
        if self.pace.random() < self.traffic:
            api.open()
        for revision in api.finishable():
            if self.pace.random() < 0.3:
                api.finish(revision)

    # --- the operator -------------------------------------------------------------------------------------------------
    def signal(self, number: int) -> None:
        if number in self.loop.signals and not self.task.done():
            self.loop.signals[number]()
        self.settle()

    def ask(self, act: Callable[[], RunningJob]) -> RunningJob | LightllmdError | None:
        """A control request: its job, or the refusal. None: the connection was closed, since the daemon ends."""
        task = self.loop.create_task(self._ask(act))
        self.settle()
        if task.done():
            return task.result()
        if not self.supervisor._finished():
            self.violated("a request was not answered")
        task.cancel()
        self.settle()
        return None

    async def _ask(self, act: Callable[[], RunningJob]) -> RunningJob | LightllmdError:
        try:
            job: RunningJob = await self.supervisor.call(act)
        except LightllmdError as refusal:
            return refusal
        return job

    # --- looks --------------------------------------------------------------------------------------------------------
    def apis(self) -> list[SimulatedProcess]:
        return [process for process in self.processes if process.kind == "api" and process.alive]

    def engines(self) -> list[SimulatedProcess]:
        return [process for process in self.processes if process.kind == "engine"]

    def program(self, one: Child) -> Api | Engine:
        program = one.process.program  # type: ignore[attr-defined]
        assert isinstance(program, Api | Engine)
        return program


def _generation(program: object) -> int | None:
    return program.configured.generation if isinstance(program, Engine) and program.configured else None
