"""The main loop of a rank other than 0: one thread that does what rank 0 tells. Heartbeats go through this loop, as
rank 0's go through its own."""

from __future__ import annotations

import gc
import logging
import platform
import select
import sys
import time
from typing import NoReturn

from lightllmd import errors
from lightllmd.architecture.ranks import Rank
from lightllmd.config.parameters import FakeSettings
from lightllmd.config.plan import Plan
from lightllmd.engine.backends import runner_for
from lightllmd.engine.ranks import commands, notes
from lightllmd.engine.ranks.commands import Call, Command, LateMasks, LaunchStep
from lightllmd.engine.ranks.guard import PeerGuard, end_process
from lightllmd.engine.ranks.meeting import join
from lightllmd.engine.ranks.member import Member
from lightllmd.engine.ranks.ring import RingReader
from lightllmd.engine.runners import fake
from lightllmd.engine.step import Masks, Runner
from lightllmd.ipc import messages
from lightllmd.ipc.channel import Channel
from lightllmd.ipc.endpoints import meeting_path

HEARTBEAT = 0.25  # seconds
# Seconds that the next message is looked for without sleeping, about a decode step of a GPU. A CPU's ranks compute on
# the cores that this would take.
SPIN = 0.002 if platform.machine() == "x86_64" else 0.0

log = logging.getLogger(__name__)


class Follower:
    """Owns its runner, and its end of the ring."""

    def __init__(self, link: Channel[messages.Down], configure: messages.EngineConfigure, plan: Plan) -> None:
        self._link, self._configure, self._plan = link, configure, plan
        engine = plan.config.engine
        settings = engine.fake if engine.backend == "fake" else FakeSettings()
        self._faults = fake.Faults(settings, plan.config.params.model_dir or "", configure.rank)
        self._spin = SPIN if plan.device.kind == "cuda" else 0.0
        self._runner: Runner
        self._ring: RingReader
        self._guard: PeerGuard
        self._poll = select.poll()  # the link, and the ring once it is there
        self._poll.register(link, select.POLLIN)
        self._phase, self._progress, self._total = "boot", 0, 0
        self._out = 0  # steps launched and not collected
        self._working = False
        self._next_beat = 0.0  # monotonic seconds

    def run(self) -> NoReturn:
        """Ends by SystemExit (Stop, SIGTERM, a supervisor that is gone), by the error that it can't go on with, or with
        rank 0."""
        self._enter("boot")
        rank = self._configure.rank
        self._faults.at_boot()
        path = meeting_path(self._configure.endpoint)
        joined, connection, (memory, wake, room) = join(path, self._configure.generation, rank, self._idle)
        guard = PeerGuard({0: connection}, end_process)
        guard.start(terminates=True)
        ring = RingReader(memory, joined.ranks - 1, rank - 1, wake, room)
        member = Member(Rank(rank, joined.ranks), self._configure.device, joined.rendezvous)
        self.serve(runner_for(self._plan, member), ring, guard)

    def serve(self, runner: Runner, ring: RingReader, guard: PeerGuard) -> NoReturn:
        """Does what the ring tells."""
        self._runner, self._ring, self._guard = runner, ring, guard
        self._poll.register(ring.wake, select.POLLIN)
        try:
            while True:
                command = self._next()
                self._working = True
                with guard.blaming():
                    self._act(command)
                self._working = False
                ring.handled()
        except SystemExit:
            guard.farewell()
            raise

    # --- commands -----------------------------------------------------------------------------------------------------
    def _act(self, command: Command) -> None:
        match command:
            case LaunchStep():
                self._launch(command)
            case Call("load"):
                self._enter("load")
                self._runner.load(self._plan, self._load_progress)
            case Call("prepare"):
                self._enter("warmup")
                self._runner.prepare(self._layer)
            case Call("stage"):
                self._runner.stage()
                self._note_staged(self._runner.memory_stats())
            case Call("unstage"):
                self._runner.unstage()
                self._note_staged(self._runner.memory_stats())
            case Call("release"):
                self._collect(0)
                self._enter("sleep")
                gc.unfreeze()
                self._runner.release(self._load_progress)
                self._enter("asleep")
            case Call("restore"):
                self._enter("load")
                self._runner.restore(self._load_progress)
                self._note_staged(self._runner.memory_stats())
            case LateMasks():
                raise errors.EngineError("rank 0 tells masks that no step waits for")

    def _launch(self, command: LaunchStep) -> None:
        self._runner.launch(command.step, self._layer, self._late_masks if command.late else None)
        self._out += 1
        if self._phase == "ready":
            self._collect(int(self._runner.overlaps))
        else:
            self._collect(0)  # a real token, or vector
            gc.collect()
            gc.freeze()
            self._enter("ready")
            self._faults.when_ready()

    def _late_masks(self) -> Masks:
        command = self._next()
        if not isinstance(command, LateMasks):
            raise errors.EngineError(f"rank 0 tells {type(command).__name__} where a step waits for masks")
        self._ring.handled()
        return command.masks

    def _collect(self, most: int) -> None:
        """Until no more than `most` steps are out. What they made is rank 0's to tell."""
        while self._out > most:
            self._runner.collect(self._beat_if_due)
            self._out -= 1
            self._progress += 1

    # --- waiting ------------------------------------------------------------------------------------------------------
    def _next(self) -> Command:
        body = self._ring.take()
        if body is None:
            body = self._awaited()
        return commands.decode(body)

    def _awaited(self) -> bytes:
        until = time.monotonic() + self._spin
        while True:
            while time.monotonic() < until:
                if (body := self._ring.take()) is not None:
                    return body
            if self._ring.sleeps():
                self._idle(max(0.0, self._next_beat - time.monotonic()))
            if (body := self._ring.take()) is not None:
                return body

    def _idle(self, seconds: float) -> None:
        """Waits for rank 0, at most so long; the supervisor is heard meanwhile."""
        self._poll.poll(seconds * 1000)
        self._read_link()
        now = time.monotonic()
        if now < self._next_beat:
            return
        if self._phase not in ("ready", "asleep"):
            self._progress += 1  # it is rank 0 that has something to do, and says so
        elif not self._working:
            self._collect(0)  # nothing may follow it for long
        self._beat(now)

    def _read_link(self) -> None:
        for message in self._link.receive():
            if isinstance(message, messages.Stop):
                sys.exit(errors.EXIT_OK)
            if isinstance(message, messages.Tune):
                logging.getLogger().setLevel(message.log_level.upper())
        if self._link.closed:
            sys.exit(errors.EXIT_OK)

    # --- signs of life ------------------------------------------------------------------------------------------------
    def _enter(self, phase: str) -> None:
        self._phase, self._progress, self._total = phase, 0, 0
        if phase != "boot":
            self._ring.note(notes.DONE, [0, 0])
        self._beat(time.monotonic())

    def _load_progress(self, done: int, total: int) -> None:
        self._progress, self._total = done, total
        self._ring.note(notes.DONE, [done, total])
        self._beat_if_due()

    def _layer(self) -> None:
        self._progress += 1
        self._beat_if_due()

    def _beat_if_due(self) -> None:
        now = time.monotonic()
        if now >= self._next_beat:
            self._read_link()
            self._beat(now)

    def _beat(self, now: float) -> None:
        self._next_beat = now + HEARTBEAT
        stats: dict[str, float] = {}
        if self._phase in ("ready", "sleep", "asleep"):
            stats = self._runner.memory_stats()
            self._note_staged(stats)
        busy = self._working or self._out > 0 or self._phase not in ("ready", "asleep")
        self._link.send(messages.Heartbeat(self._phase, self._progress, busy, self._total, stats), droppable=True)

    def _note_staged(self, stats: dict[str, float]) -> None:
        self._ring.note(notes.STAGED, [int(stats.get("staged_bytes", 0)), int(stats.get("staged_total", 0))])
