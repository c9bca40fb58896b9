"""The supervisor: one queue of events, one task that applies them.

Signals, exits, messages, control requests and timers only enqueue; `Supervisor._apply` and what it calls are the
only code that changes state, and they never wait.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightllmd import __version__
from lightllmd.config.cli import Invocation
from lightllmd.config.plan import Facts, Plan
from lightllmd.config.report import report
from lightllmd.config.resolve import resolve
from lightllmd.errors import EXIT_FAILED, EXIT_OK, LightllmdError
from lightllmd.http.bounds import raise_descriptor_limit
from lightllmd.ipc.flight_record import Flight
from lightllmd.ipc.messages import Drain, Health, Models
from lightllmd.ipc.signals import ignore_meaningless
from lightllmd.supervisor.background import Errand
from lightllmd.supervisor.change import planning
from lightllmd.supervisor.change.reload import Settings
from lightllmd.supervisor.children import crashes
from lightllmd.supervisor.children.child import Child, Exited, Readable
from lightllmd.supervisor.children.exits import Ending
from lightllmd.supervisor.children.hang_rule import RunningClock
from lightllmd.supervisor.context import Commands, Context
from lightllmd.supervisor.control import server as control
from lightllmd.supervisor.control import status
from lightllmd.supervisor.control.verbs import Asked, Verbs
from lightllmd.supervisor.host import listeners as sockets
from lightllmd.supervisor.host import orphans
from lightllmd.supervisor.host.fd_store import FdStore
from lightllmd.supervisor.host.notify import Notifier, is_journal
from lightllmd.supervisor.host.procfs import is_stopped, memory_kills, resident
from lightllmd.supervisor.host.runtime_directory import Runtime, control_socket_path
from lightllmd.supervisor.journal import logs
from lightllmd.supervisor.workers import memory_gate as memory
from lightllmd.supervisor.workers.engines import Engines
from lightllmd.supervisor.workers.front_end import FrontEnd
from lightllmd.supervisor.workers.generation import Engine
from lightllmd.supervisor.workers.health_monitor import Monitor

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
TICK = 0.1  # seconds between two looks at deadlines
_SLOW_EVERY = 10  # ticks between two looks at what changes slowly (memory, stopped workers, systemd's time-outs)
_EXTENSION = 30  # seconds to start or stop asked of systemd at a time; our own deadlines are the ones that rule


@dataclass(frozen=True)
class Signalled:
    """Event: this process got a signal."""

    number: int


@dataclass(frozen=True)
class Ticked:
    """Event: time has passed."""


@dataclass(frozen=True)
class Requested:
    """Event: a control request that changes something; its answer goes into `answer`."""

    act: Callable[[], Any]
    answer: asyncio.Future[Any]


class Supervisor:
    """Built outside the loop (so that a refusal of the host comes before anything is started), then `run` once."""

    def __init__(self, context: Context, settings: Settings, notifier: Notifier) -> None:
        self.context = context
        self.settings = settings
        self.config_file = settings.invocation.config_file
        self.notifier = notifier
        self.pid = os.getpid()
        self.started = self.since = time.time()
        self.state = "starting"
        self.served_since: float | None = None  # Unix time of the first readiness
        self.queue: asyncio.Queue[object] = asyncio.Queue()
        context.post = self.queue.put_nowait
        context.report_fault = self._report_fault
        self.front = FrontEnd(context, context.config.http.workers, self._greet)
        self.engines = Engines(context, self.front.tell)
        self.verbs = Verbs(context, self.engines, self.front, settings, self._relisten)
        self.monitor = Monitor(context, self.engines, self.front)
        self.crashes = crashes.open_crashes(context.events, os.environ.get("STATE_DIRECTORY", ""))
        self._first_facts: Errand[Facts] | None = None
        self._exit_code = EXIT_OK
        self._health: tuple[bool, str] = (False, "")
        self._ticks = 0
        self._memory_kills = memory_kills()  # by the kernel, as last looked at
        self._last_watchdog = 0.0
        self._signals_to_stop = 0
        self._told_stopping = False

    @property
    def plan(self) -> Plan | None:
        """In force; None before it is made."""
        return self.engines.serving.plan

    @property
    def urls(self) -> list[str]:
        tls = bool(self.context.config.http.tls_certificate)
        return [sockets.url(sock, tls) for sock in self.context.listeners]

    async def run(self) -> int:
        """Until told to stop; the daemon's exit code."""
        loop = asyncio.get_running_loop()
        for number in (*ENDING, signal.SIGHUP, signal.SIGCHLD):
            loop.add_signal_handler(number, self.context.post, Signalled(number))
        orphans.become_subreaper()
        raise_descriptor_limit()  # the children's, too
        server = control.Server(self)
        self._first_facts = Errand(self.context, planning.facts_of(self.context, self.context.config, self.config_file))
        ticker = loop.create_task(self._tick_for_ever())
        self._announce()
        try:
            await server.start()
            while not self._finished():
                event = await self.queue.get()
                self.context.clock.advance()
                self._apply(event)
                self._settle()
        except Exception as fault:  # the state is unknown: a new start is sound
            self._exit_code = EXIT_FAILED
            self._report_fault("the supervisor's loop", fault)
        finally:
            tasks = [ticker, *self.context.errands]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._kill_the_rest()
            if self.verbs.stopping is not None:
                self.verbs.stopping.finish("done" if self._exit_code == EXIT_OK else "failed", "stopped")
            self.context.events.add("stop", f"stopped, exit code {self._exit_code}")
            self.context.log.feed.close()
            self.context.events.feed.close()
            await server.stop()
            await asyncio.to_thread(self.crashes.close)
        return self._exit_code

    async def call(self, act: Callable[[], Any]) -> Any:
        """Runs `act` inside the single-writer loop and returns (or raises) what it does."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.context.post(Requested(act, answer))
        return await answer

    # --- events --------------------------------------------------------------------------------------------------
    def _apply(self, event: object) -> None:
        match event:
            case Exited(child):
                self._bury(child)
            case Readable(child):
                self._hear(child)
            case Requested(act, answer):
                self._answer(act, answer)
            case Signalled(signal.SIGCHLD):
                self._reap_strangers()
            case Signalled(number):
                self._on_signal(number)
            case Ticked():
                self._on_tick()
            case memory.Measured(gate):
                gate.measured(event)
                self._start_due()

    def _settle(self) -> None:
        """After every event: what follows from the new state."""
        if self._first_facts is not None and self._first_facts.done:
            first, self._first_facts = self._first_facts, None
            self._make_first_plan(first)
        self._tell_reload()
        self.verbs.step()
        self._tell_reload()
        self._see_off()
        health = status.health(self)
        if health[0] and self.front.ready and self.served_since is None:
            self._first_readiness()
        # After that: state and readiness change in the same event.
        if (state := status.state(self)) != self.state:
            self.state, self.since = state, time.time()
        if health != self._health:
            self._health = health
            self.front.tell(Health(*health))
        if self.verbs.stopping is not None and not self._told_stopping:
            self._told_stopping = True
            self.notifier.send(STOPPING=1)

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            self.context.events.add("reload", "SIGHUP: reloading")
            try:
                self.verbs.reload(Asked())
            except LightllmdError as refusal:
                self.context.events.add("warning", f"SIGHUP: no reload: {refusal.message}", level="warning")
            return
        self._signals_to_stop += 1
        self.context.events.add("stop", f"{name}: {'stopping now' if self._signals_to_stop > 1 else 'stopping'}")
        if self._signals_to_stop > 2:
            self._kill_the_rest()
        else:
            self.verbs.stop(Asked(), now=self._signals_to_stop > 1 or number == signal.SIGQUIT)

    def _on_tick(self) -> None:
        self._ticks += 1
        for child in self._children():
            child.check()
        self.monitor.tick(steady=self.state in ("serving", "degraded") and not self.verbs.jobs.running())
        self._start_due()
        if self._ticks % _SLOW_EVERY == 1:
            self._memory_kills = memory_kills()
            for child in self._children():
                child.memory = resident(child.pid)
                child.vitals.hold(is_stopped(child.pid), self.context.clock.now)
            if self.config_file is not None and self.settings.changed():
                Errand(self.context, self.settings.look(self.context.config, self.context.aside))
        self._tell_systemd()

    def _start_due(self) -> None:
        if self.plan is not None and not self.verbs.ending:
            self.engines.tick()
            self.front.tick()

    def _make_first_plan(self, facts: Errand[Facts]) -> None:
        if self.verbs.ending:
            return
        try:
            read = facts.result()
            plan = resolve(self.context.config, read, self.config_file)
        except LightllmdError as failure:
            self._give_up(failure.message, failure.exit_code)
            return
        except Exception as fault:
            self._report_fault("the first plan", fault)
            self._give_up(crashes.words(fault), EXIT_FAILED)
            return
        self.engines.serving.plan_for(plan, read)
        self.engines.in_force()
        for line in report(plan).splitlines():
            self.context.log.own("info", line)
        self.front.start()
        self.engines.serving.worker.start()

    def _tell_reload(self) -> None:
        if self.notifier.reloading == self.verbs.reloading:
            return
        if self.verbs.reloading:
            self.notifier.reload_began()
        else:
            self.notifier.reload_ended()

    def _see_off(self) -> None:
        """Ends the engines that have finished what they had before they were replaced."""
        for engine in self.engines.leaving:
            if engine.wanted and (self.front.none_of(engine.revision) or engine.hopeless):
                self.front.forget(engine.revision, "the model was replaced")
                engine.end("replaced")
        self.engines.forget_ended()

    def _relisten(self, listeners: list[socket.socket]) -> None:
        """Api workers that start from now on get these; whoever asked closes the others."""
        self.context.listeners = listeners
        self.context.fd_store.keep(listeners)
        self.context.log.own("info", f"listening on {', '.join(self.urls)}")

    def _hear(self, child: Child) -> None:
        if child.exited:
            return
        became_ready = child.receive()
        child.listen()
        api = self.front.owner(child)
        if api is not None:
            self.front.heard(child)
            if became_ready:
                api.became_ready(child)
        elif became_ready and (engine := self.engines.owner(child)):
            self.engines.became_ready(engine)

    def _bury(self, child: Child) -> None:
        ending = child.autopsy(memory_ran_out=memory_kills() > self._memory_kills)
        if ending is None:
            return
        again = not self.verbs.ending
        api, engine = self.front.owner(child), self.engines.owner(child)
        flight = engine.generation.flight() if engine and engine.generation else None
        if api is not None:
            self.engines.api_gone(api.index, child.number)
            child.dispose()
            self.front.died(api, child, ending, again)
        elif engine is not None:
            self.engines.died(engine, child, ending, again)
            if again and engine.wanted and (held := self.front.in_flight_of(engine.revision)):
                self.context.events.add("held", f"{held} requests are held for the next generation")
        elif self.engines.spare.owns(child):
            self.engines.spare.died(ending)
            self._report(child, ending, None, None)
            return
        if not ending.changed:  # no crash, and tried again and again: reports of crashes are not to give way to it
            self._report(child, ending, engine or self.engines.serving, flight)
        if ending.exit_code is not None and again and not child.asked and self.served_since is None:
            self._give_up(f"{child.worker}: {ending.cause}", ending.exit_code)

    def _report(self, child: Child, ending: Ending, engine: Engine | None, flight: Flight | None) -> None:
        """`engine`: that it was, or whose revision was in force for it."""
        plan = engine.plan if engine else None
        self.crashes.add(
            child,
            ending,
            config=plan.config if plan else self.context.config,
            model=plan.model_name if plan else "",
            revision=engine.revision if engine else 0,
            flight=flight,
        )

    def _reap_strangers(self) -> None:
        owned = {child.pid: child for child in self._children()}

        def reap(pid: int) -> bool:
            if pid in owned:
                owned[pid].process.reap()  # its Exited event follows, or is in the queue already
            return pid in owned or any(child.reap(pid) for child in list(self.context.brief))

        for pid in orphans.reap_strangers(reap):
            self.context.log.own("debug", f"reaped an orphan, pid {pid}")

    def _report_fault(self, doing: str, fault: BaseException) -> None:
        plan = self.plan
        config, model = (plan.config, plan.model_name) if plan else (self.context.config, "")
        report = self.crashes.add_fault(doing, fault, config=config, model=model, revision=self.context.revision)
        for line in report.stderr:
            self.context.log.own("error", line)

    def _answer(self, act: Callable[[], Any], answer: asyncio.Future[Any]) -> None:
        if answer.cancelled():
            return  # the client is gone: nothing was promised, nothing is done
        try:
            answer.set_result(act())
        except LightllmdError as refusal:
            answer.set_exception(refusal)
        except Exception as fault:
            self._report_fault("a control request", fault)
            answer.set_exception(LightllmdError(crashes.words(fault)))

    # --- deeds ---------------------------------------------------------------------------------------------------
    def _announce(self) -> None:
        context = self.context
        context.events.add(
            "start", f"lightllmd {__version__}, pid {self.pid}, configuration {self.config_file or '(flags)'}"
        )
        context.log.own("info", f"listening on {', '.join(self.urls)}; control socket {context.runtime.control_socket}")
        for warning in context.config.warnings:
            context.events.add("warning", warning, level="warning")
        exposed = [url for url, sock in zip(self.urls, context.listeners, strict=True) if sockets.beyond_loopback(sock)]
        if exposed and not context.config.http.api_keys_file:
            context.events.add(
                "warning",
                f"{', '.join(exposed)} can be reached from other hosts and asks for no key: set [http] api_keys_file",
                level="warning",
            )

    def _greet(self, child: Child) -> None:
        """Tells a new api worker how things stand."""
        child.send(Health(*self._health))
        if self.verbs.draining:
            child.send(Drain())
        if self.context.config.models:
            child.send(Models(list(self.context.config.models)))
        for engine in self.engines:
            if up := engine.up():
                child.send(up)

    def _first_readiness(self) -> None:
        assert self.plan is not None
        self.served_since = time.time()
        taken = self.served_since - self.started
        self.context.events.add("ready", f"serving {self.plan.model_name} {taken:.1f} s after the start")
        self.notifier.ready()

    def _give_up(self, why: str, code: int) -> None:
        """It never came to serve and never will with this plan: the daemon ends with that code."""
        self._exit_code = code
        for line in why.splitlines():
            self.context.events.add("stop", line, level="error")
        self.verbs.stop(Asked(), now=True)

    def _tell_systemd(self) -> None:
        if not self.notifier.active:
            return
        now = self.context.clock.now
        interval = self.notifier.watchdog_interval
        if interval is not None and now - self._last_watchdog >= interval - TICK:
            self._last_watchdog = now
            self.notifier.send(WATCHDOG=1)
        if (self._starting or self.verbs.stopping) and self._ticks % _SLOW_EVERY == 1:
            self.notifier.send(EXTEND_TIMEOUT_USEC=_EXTENSION * 1_000_000)
        if self._ticks % (_SLOW_EVERY // 2) == 1:
            self.notifier.status(status.sentence(self))

    @property
    def _starting(self) -> bool:
        """On the way to the first readiness; beyond the start limit systemd's own patience shall decide."""
        workers = [self.engines.serving.worker, *(api.worker for api in self.front.apis)]
        on_the_way = self.plan is None or not any(worker.limited or worker.fatal for worker in workers)
        return self.served_since is None and self.verbs.stopping is None and on_the_way

    def _children(self) -> list[Child]:
        return [*self.front.children(), *self.engines.children()]

    def _finished(self) -> bool:
        return self.verbs.ending and not self._children()

    def _kill_the_rest(self) -> None:
        for child in self._children():
            child.kill("stopped")

    # --- sources of events -------------------------------------------------------------------------------------
    async def _tick_for_ever(self) -> None:
        while True:
            self.context.post(Ticked())
            await asyncio.sleep(TICK)


async def _until_the_end(supervisor: Supervisor) -> int:
    """Its exit code. No signal cuts off what is cleared up after it."""
    try:
        return await supervisor.run()
    finally:
        for number in ENDING:
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)


def main(invocation: Invocation, commands: Commands | None = None) -> int:
    """Runs the daemon; its exit code. `commands` replaces how children are started (for tests)."""
    ignore_meaningless()
    settings = Settings(invocation)
    config = settings.effective
    faulthandler.enable()  # systemd's watchdog sends SIGABRT
    sink = logs.Sink(sys.stderr.fileno())
    journal = is_journal(os.environ, sys.stderr.fileno())
    log = logs.LogBook(config.supervisor.log_lines, config.log.level, logs.renderer(config.log.format, journal), sink)
    logging.basicConfig(handlers=[logs.StandardLogging(log)], level=logging.WARNING, force=True)
    runtime, context = None, None
    listeners: list[socket.socket] = []
    notifier = Notifier(os.environ, os.getpid())
    try:
        runtime = Runtime(control_socket_path(config.supervisor.control_socket, os.environ, os.getuid()))
        fd_store = FdStore(notifier)
        where = config.params.host, config.params.port
        listeners, activated = sockets.opened(*where, os.environ, os.getpid(), fd_store)
        context = Context(
            config=config,
            clock=RunningClock(),
            log=log,
            events=logs.EventBook(log),
            runtime=runtime,
            commands=commands or Commands(),
            listeners=listeners,
            activated=activated,
            fd_store=fd_store,
            journal=journal,
        )
        return asyncio.run(_until_the_end(Supervisor(context, settings, notifier)))
    except LightllmdError as refusal:
        for line in refusal.message.splitlines():
            log.own("error", line)
        return refusal.exit_code or EXIT_FAILED
    finally:
        notifier.close()
        for sock in context.listeners if context else listeners:
            sock.close()
        if runtime is not None:
            runtime.close()
        sink.close()
