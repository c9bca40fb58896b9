"""One process of a worker, from its spawn to its death."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from lightllmd.errors import SystemFailure
from lightllmd.ipc import channel
from lightllmd.ipc.messages import Down, Failed, Heartbeat, Prepared, Probed, Stop, Up
from lightllmd.supervisor.children import exits, hang_rule
from lightllmd.supervisor.children.process import Process
from lightllmd.supervisor.children.restart import PROVED_AFTER
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.journal.logs import parse_output

TAIL = 200  # lines of its output kept for its crash report: a stack of each thread fits
STOP_GRACE = 2.0  # seconds at most between `Stop` and SIGTERM
# Counters of which any growth since "ready" shows that the worker has served a request.
_SERVICE = ("tokens_out", "ok", "failed", "cancelled")


@dataclass(frozen=True)
class Exited:
    """Event: the process is dead and not yet reaped."""

    child: Child


@dataclass(frozen=True)
class Readable:
    """Event: there are messages in the child's channel, or it was closed."""

    child: Child


class Child:
    """Owned by one `Worker`, or a spare. Everything but the two event callbacks happens inside the single-writer loop.

    starting -> running -> stopping -> exited; any of the first three may go straight to exited.
    """

    def __init__(
        self,
        context: Context,
        worker: str,
        command: Callable[[int], Sequence[str]],
        pass_fds: Sequence[int] = (),
    ) -> None:
        self._context = context
        self._loop = asyncio.get_running_loop()
        self.worker = worker
        # By `configure`; a spare engine waits for that.
        self.configured = False
        self.number = 0  # the engine's generation, the api worker's epoch
        self.metrics_id = ""  # RuntimeDirectory.take_metrics_id; released when this child's death is handled
        self.started = time.time()
        self.vitals = hang_rule.Vitals(moved=context.clock.now)
        self.stats: dict[str, float] = {}
        self.ready_at: float | None = None  # running clock
        self.memory = 0  # bytes resident, as last measured
        self.tail: deque[str] = deque(maxlen=TAIL)
        self.asked: str | None = None  # what it was asked to end for; its end is no failure then
        self.hung: str | None = None
        self.held = False  # what it is ended for as hung is not its own doing
        self._killed = False  # by us
        self.failed: Failed | None = None
        self.said: list[Prepared | Probed] = []  # answers, taken out by the part that asked
        self.exited = False
        self._service_at_ready: dict[str, float] = {}
        self._escalation: list[tuple[float, int]] = []  # (running clock, signal): those still to be sent
        try:
            self.channel, theirs = channel.pair()
        except OSError as refused:
            raise SystemFailure(f"can't make a socket pair: {refused}") from refused
        try:
            self.process = Process(
                command(theirs.fileno()),
                on_exit=lambda: context.post(Exited(self)),
                on_output=self._output,
                pass_fds=(theirs.fileno(), *pass_fds),
            )
        except SystemFailure:
            self.channel.close()
            raise
        finally:
            theirs.close()
        self._loop.add_reader(self.channel.fileno(), self._readable)

    def configure(self, worker: str, number: int, metrics_id: str, first: Down) -> None:
        """Tells it what to be. Its start counts from here."""
        self.worker, self.number, self.metrics_id, self.configured = worker, number, metrics_id, True
        self.started, self.vitals = time.time(), hang_rule.Vitals(moved=self._context.clock.now)
        self.send(first)

    @property
    def pid(self) -> int:
        """Of the process; the kernel may give the number to another once it is reaped."""
        return self.process.pid

    @property
    def dying(self) -> bool:
        """Its end of the channel is closed: the kernel is taking it down, which lasts a while where it held a GPU."""
        return self.channel.closed and not self.exited

    @property
    def ready(self) -> bool:
        """In service: it said so, is alive, and nothing ends it."""
        ends = self.exited or self.dying or self._killed or self.hung is not None or self.failed is not None
        return self.ready_at is not None and not ends

    @property
    def state(self) -> str:
        """ "starting", "running", "stopping" or "exited"."""
        if self.exited:
            return "exited"
        if self._escalation or self.asked or self.hung:
            return "stopping"
        return "running" if self.ready else "starting"

    @property
    def proved(self) -> bool:
        """Whether it has been of use, so that its death doesn't count as a failed start."""
        if self.ready_at is None:
            return False
        if self._context.clock.now - self.ready_at >= PROVED_AFTER:
            return True
        return any(self.stats.get(name, 0) > self._service_at_ready.get(name, 0) for name in _SERVICE)

    # --- messages --------------------------------------------------------------------------------------------
    def send(self, message: Down) -> None:
        """Never waits: what its socket doesn't take now follows when it does. To a dead process: nothing."""
        if self.exited:
            return
        sent = self.channel.send(message)
        if self.channel.pending:
            self._loop.add_writer(self.channel.fileno(), self._writable)
        if not sent and self.process.reap() is None:
            self._context.log.own(
                "warning", f"{self.worker}: {type(message).__name__} could not be sent to pid {self.pid}"
            )

    def keep_told(self, message: Down) -> bool:
        """`send` of what the next message of its kind replaces: dropped while anything waits for the process. False:
        it was dropped."""
        if self.exited:
            return True
        sent = self.channel.send(message, droppable=True)
        if self.channel.pending:
            self._loop.add_writer(self.channel.fileno(), self._writable)
        return sent

    def _writable(self) -> None:
        self.channel.flush()
        if not self.channel.pending:
            self._loop.remove_writer(self.channel.fileno())

    def receive(self) -> bool:
        """Takes in all messages that are there. True when the worker has just become ready."""
        was_ready = self.ready_at is not None
        while True:
            try:
                for message in self.channel.receive():
                    self._take(message)
                break
            except msgspec.DecodeError as garbage:
                self._context.log.own("error", f"{self.worker}: not a message: {garbage}")
        if self.channel.closed and not self.exited:
            self._loop.remove_reader(self.channel.fileno())
        return not was_ready and self.ready_at is not None

    def _take(self, message: Up) -> None:
        if isinstance(message, Heartbeat):
            self._hear(message)
        elif isinstance(message, Failed):
            self.failed = message
        else:
            self.said.append(message)

    def _hear(self, beat: Heartbeat) -> None:
        now = self._context.clock.now
        self.vitals.hear(beat, now)
        self.stats = beat.stats
        if beat.phase != "ready":
            self.ready_at = None  # an engine that was put to sleep
        elif self.ready_at is None:
            self.ready_at = now
            self._service_at_ready = dict(beat.stats)

    def _readable(self) -> None:
        # Read inside the single-writer loop, so that a last word is never overtaken by the death it explains.
        self._loop.remove_reader(self.channel.fileno())
        self._context.post(Readable(self))

    def listen(self) -> None:
        """Wait for the next message; called when the last ones have been taken in."""
        if not self.exited and not self.channel.closed:
            self._loop.add_reader(self.channel.fileno(), self._readable)

    def _output(self, line: str) -> None:
        level, message = parse_output(line)
        self.tail.append(message)
        self._context.log.write(self.worker, level, message)

    # --- the end -----------------------------------------------------------------------------------------------
    def terminate(self, why: str) -> None:
        """SIGTERM now, SIGKILL after stop_timeout."""
        now = self._context.clock.now
        self.asked = why
        self._escalate((now, signal.SIGTERM), (now + self._context.config.supervisor.stop_timeout, signal.SIGKILL))

    def stop(self, why: str, within: float | None = None) -> None:
        """A `Stop` message, SIGTERM if that is not heard, SIGKILL after stop_timeout; SIGKILL alone after `within`
        seconds, where they are given.

        A worker that is not in service yet may be too busy to listen and has nothing to end: SIGTERM at once.
        """
        if not self.ready:
            self.terminate(why)
            return
        now, timeout = self._context.clock.now, self._context.config.supervisor.stop_timeout
        self.asked = why
        self.send(Stop())
        if within is not None:
            self._escalate((now + within, signal.SIGKILL))
        else:
            self._escalate((now + min(STOP_GRACE, timeout / 2), signal.SIGTERM), (now + timeout, signal.SIGKILL))

    def retire(self, why: str) -> None:
        """It finishes by itself (`Retire` was sent); if it doesn't within drain_timeout it is ended."""
        settings = self._context.config.supervisor
        late = self._context.clock.now + settings.drain_timeout
        self.asked = why
        self._escalate((late, signal.SIGTERM), (late + settings.stop_timeout, signal.SIGKILL))

    def kill(self, why: str) -> None:
        """SIGKILL now, to its whole process group."""
        self.asked, self._killed = why, True
        self._escalate((self._context.clock.now, signal.SIGKILL))

    def expect_end(self) -> None:
        """It said that it failed: SIGKILL where it doesn't end soon."""
        if self.failed is not None and not self._escalation:
            self._escalate((self._context.clock.now + self._context.config.supervisor.abort_grace, signal.SIGKILL))

    def check(self) -> None:
        """At every tick: sends the signals that are due."""
        if not self.exited:
            self._escalate(*self._escalation)

    def check_hang(self) -> None:
        """At every tick: ends it where it is overdue."""
        now, settings = self._context.clock.now, self._context.config.supervisor
        if self.exited or not self.configured or self.hung is not None:
            return
        if reason := hang_rule.overdue(self.vitals, settings, now):
            self.abort(reason, held=self.vitals.stopped is not None)

    def abort(self, reason: str, *, held: bool) -> None:
        """Ends it as hung: SIGABRT, on which faulthandler prints every thread's stack, then SIGKILL. `held`: what it
        was computing is not the cause."""
        now, grace = self._context.clock.now, self._context.config.supervisor.abort_grace
        self.hung, self.held = reason, held
        self._context.events.add("hang", f"{reason}: SIGABRT", self.worker, "error")
        # A stopped process can't print; SIGKILL always works.
        self._escalate((now, signal.SIGABRT), (now + grace, signal.SIGKILL))

    def _escalate(self, *steps: tuple[float, int]) -> None:
        """Sends the signals that are due and keeps the rest for later."""
        now = self._context.clock.now
        for _, number in (step for step in steps if step[0] <= now):
            self.process.send_signal(number)
        self._escalation = [step for step in steps if step[0] > now]

    def reap_and_classify(self, memory_ran_out: bool) -> exits.Ending | None:
        """Reaps it, reads its last messages and says how it ended; None when it isn't dead. `memory_ran_out`: the
        kernel has just killed for want of memory."""
        returncode = self.process.reap()
        if returncode is None:
            return None
        self.receive()
        self.exited = True
        return exits.classify(
            returncode,
            failed=self.failed,
            hung=self.hung,
            held=self.held,
            asked=self.asked,
            memory_ran_out=memory_ran_out,
        )

    def dispose(self) -> None:
        """After `reap_and_classify`: keeps its last output, lets go of every descriptor."""
        self.process.dispose()
        self._loop.remove_reader(self.channel.fileno())
        self._loop.remove_writer(self.channel.fileno())
        self.channel.close()
