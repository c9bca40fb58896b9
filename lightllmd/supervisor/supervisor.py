"""The supervisor: one queue of events, one task that applies them.

Signals, exits, messages, control requests and timers only enqueue; `Supervisor._apply` and what it calls are the
only code that changes state, and they never wait.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightllmd import __version__
from lightllmd.config.plan import Facts
from lightllmd.config.report import report
from lightllmd.config.resolve import resolve
from lightllmd.errors import EXIT_FAILED, EXIT_OK, LightllmdError
from lightllmd.http.bounds import raise_descriptor_limit
from lightllmd.ipc.flight_record import Flight
from lightllmd.ipc.messages import Health
from lightllmd.supervisor.background import BackgroundTask
from lightllmd.supervisor.change import planning
from lightllmd.supervisor.change.settings import Settings
from lightllmd.supervisor.children import crashes
from lightllmd.supervisor.children.child import Child, Exited, Readable
from lightllmd.supervisor.children.exits import Ending
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.control import server, status
from lightllmd.supervisor.control.overview import OverviewFeed
from lightllmd.supervisor.control.verbs import Caller
from lightllmd.supervisor.daemon import Daemon, Requested
from lightllmd.supervisor.host import listeners as http_listeners
from lightllmd.supervisor.host import orphans
from lightllmd.supervisor.host.notify import Notifier
from lightllmd.supervisor.host.procfs import is_stopped, memory_kills, resident
from lightllmd.supervisor.systemd import SystemdReport
from lightllmd.supervisor.workers.generation import Engine
from lightllmd.supervisor.workers.memory_gate import Measured
from lightllmd.supervisor.workers.replicas import Replicas

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
TICK = 0.1  # seconds between two looks at deadlines
_SLOW_EVERY = 10  # ticks between two looks at what changes slowly (memory, stopped workers, files)


@dataclass(frozen=True)
class Signalled:
    """Event: this process got a signal."""

    number: int


@dataclass(frozen=True)
class Ticked:
    """Event: time has passed."""


class Supervisor(Daemon):
    """Built outside the loop (so that a refusal of the host comes before anything is started), then `run` once."""

    def __init__(self, context: Context, settings: Settings, notifier: Notifier) -> None:
        super().__init__(context, settings)
        self.queue: asyncio.Queue[object] = asyncio.Queue()
        context.post = self.queue.put_nowait
        context.report_fault = self._report_fault
        self._systemd = SystemdReport(self, notifier)
        self._overviews = OverviewFeed(self)
        self._first_facts: BackgroundTask[Facts] | None = None
        self._look: BackgroundTask[None] | None = None  # at the files that a reload would take up
        self._exit_code = EXIT_OK
        self._ticks = 0
        self._memory_kills = memory_kills()  # by the kernel, as last looked at
        self._signals_to_stop = 0

    async def run(self) -> int:
        """Until told to stop; the daemon's exit code."""
        loop = asyncio.get_running_loop()
        for number in (*ENDING, signal.SIGHUP, signal.SIGCHLD):
            loop.add_signal_handler(number, self.context.post, Signalled(number))
        orphans.become_subreaper()
        raise_descriptor_limit()  # the children's, too
        control = server.ControlServer(self)
        self._first_facts = BackgroundTask(
            self.context, planning.facts_of(self.context, self.context.config, self.config_file)
        )
        ticker = loop.create_task(self._tick_for_ever())
        self._announce()
        try:
            await control.start()
            while not self._finished():
                event = await self.queue.get()
                self.context.clock.advance()
                self._apply(event)
                self._follow_up()
        except Exception as fault:  # the state is unknown: a new start is sound
            self._exit_code = EXIT_FAILED
            self._report_fault("the supervisor's loop", fault)
        finally:
            tasks = [ticker, *self.context.background_tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._kill_the_rest()
            if self.verbs.stopping is not None:
                self.verbs.stopping.finish("done" if self._exit_code == EXIT_OK else "failed", "stopped")
            self.context.events.add("stop", f"stopped, exit code {self._exit_code}")
            self.context.log.feed.close()
            self.context.events.feed.close()
            await control.stop()
            await asyncio.to_thread(self.crashes.close)
        return self._exit_code

    # --- events --------------------------------------------------------------------------------------------------
    def _apply(self, event: object) -> None:
        match event:
            case Exited(child):
                self._on_exit(child)
            case Readable(child):
                self._on_message(child)
            case Requested(act, answer):
                self._answer(act, answer)
            case Signalled(signal.SIGCHLD):
                self._reap_orphans()
            case Signalled(number):
                self._on_signal(number)
            case Ticked():
                self._on_tick()
            case Measured(gate):
                gate.measured(event)
                self._start_due()

    def _follow_up(self) -> None:
        """After every event: what follows from the new state."""
        if self._first_facts is not None and self._first_facts.done:
            first, self._first_facts = self._first_facts, None
            self._make_first_plan(first)
        self._systemd.reload()
        self.certificate.step()
        self.keys.step()
        self.lost.step()
        if self.lost.to_replan() and self.verbs.replan():
            self.lost.replanned()
        self.verbs.step()
        self._systemd.reload()
        self._retire_drained()
        self.visuals.step()
        health = status.health(self)
        if health[0] and self.front.ready and self.served_since is None:
            self._first_readiness()
        # After that: state and readiness change in the same event.
        if (state := status.state(self)) != self.state:
            self.state, self.since = state, time.time()
        if health != self.health:
            self.health = health
            self._overviews.tell()  # first: what a page says beside its health is no older
            self.front.tell(Health(*health))
        self._systemd.stopping()

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            self.context.events.add("reload", "SIGHUP: reloading")
            try:
                self.verbs.reload(Caller())
            except LightllmdError as refusal:
                self.context.events.add("warning", f"SIGHUP: no reload: {refusal.message}", level="warning")
            return
        self._signals_to_stop += 1
        self.context.events.add("stop", f"{name}: {'stopping now' if self._signals_to_stop > 1 else 'stopping'}")
        if self._signals_to_stop > 2:
            self._kill_the_rest()
        else:
            self.verbs.stop(Caller(), now=self._signals_to_stop > 1 or number == signal.SIGQUIT)

    def _on_tick(self) -> None:
        self._ticks += 1
        for child in self.children():
            child.check()
        for child in (*self.front.children(), *self.visuals.children(), *self.pusher.children()):
            child.check_hang()
        self.engines.check_hang()
        self.monitor.tick(steady=self.state in ("serving", "degraded") and not self.verbs.jobs.running())
        self._start_due()
        if self._ticks % _SLOW_EVERY == 1:
            self._memory_kills = memory_kills()
            for child in self.children():
                child.memory = resident(child.pid)
                child.vitals.hold(is_stopped(child.pid), self.context.clock.now)
            self._overviews.tell()
            self._look_at_files()
            self.certificate.look()
            self.keys.look()
        self._systemd.tick(TICK)

    def _look_at_files(self) -> None:
        """One look at a time: a file system that hangs holds up this alone."""
        if self._look is None or self._look.done:
            model = self.plan.model if self.plan else None
            self._look = BackgroundTask(self.context, self.settings.look(self.context, model.stamps if model else []))

    def _start_due(self) -> None:
        if self.plan is not None and not self.verbs.ending:
            self.engines.tick()
            self.visuals.tick()
            self.front.tick()
            self.pusher.tick()

    def _make_first_plan(self, facts: BackgroundTask[Facts]) -> None:
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
        for warning in plan.warnings:
            self.context.events.add("warning", warning, level="warning")
        self.front.start()
        self.engines.serving.start()
        self.pusher.in_force()

    def _retire_drained(self) -> None:
        """Ends the engines that have finished what they had before they were replaced."""
        for replicas in self.engines.leaving:
            if replicas.wanted and (self.front.none_of(replicas.revision) or replicas.permanently_failed):
                self.front.forget(replicas.revision, "the model was replaced")
                replicas.end("replaced")
        self.engines.forget_ended()

    def _on_message(self, child: Child) -> None:
        if child.exited:
            return
        became_ready = child.receive()
        child.listen()
        api = self.front.owner(child)
        if api is not None:
            self.front.heard(child)
            if became_ready:
                api.became_ready(child)
        elif engine := self.engines.owner(child):
            self.engines.heard(engine, child, became_ready)
        elif became_ready and (visual := self.visuals.owner(child)):
            visual.worker.became_ready()
        elif became_ready and self.pusher.owns(child):
            self.pusher.worker.became_ready()

    def _on_exit(self, child: Child) -> None:
        ending = child.reap_and_classify(memory_ran_out=memory_kills() > self._memory_kills)
        if ending is None:
            return
        again = not self.verbs.ending
        api, engine, flight = self.front.owner(child), self.engines.owner(child), None
        if api is not None:
            self.engines.api_gone(api.index, child.number)
            child.dispose()
            self.front.died(api, child, ending, again)
        elif engine is not None:
            first = self.engines.died(engine, child, ending, again)
            if first is None:
                return
            child, ending, flight = first.child, first.ending, first.flight
            if not first.asked:
                self.lost.look()
            self._tell_held(engine, again)
        elif self.engines.spares.owns(child):
            self.engines.spares.died(child, ending)
            self._report(child, ending, None, None)
            return
        elif visual := self.visuals.owner(child):
            visual.died(child, ending, again)
            self._report(child, ending, visual.replicas, None)
            return
        elif self.pusher.owns(child):
            self.pusher.died(child, ending, again)
            self._report(child, ending, None, None)
            return
        if not ending.changed:  # no crash, and tried again and again: reports of crashes are not to give way to it
            self._report(child, ending, engine or self.engines.serving, flight)
        all_failed = engine is None or self.engines.serving.permanently_failed
        if ending.exit_code is not None and again and not child.asked and self.served_since is None and all_failed:
            self._give_up(f"{child.worker}: {ending.cause}", ending.exit_code)

    def _tell_held(self, engine: Engine, again: bool) -> None:
        """What becomes of the requests of its revision now that its generation is dead."""
        if again and engine.wanted and (held := self.front.in_flight_of(engine.revision)):
            others = [other for other in self.engines if other.revision == engine.revision and other.up()]
            what = "go on with the other engines" if others else "are held for the next generation"
            self.context.events.add("held", f"{held} requests {what}")

    def _report(self, child: Child, ending: Ending, engine: Engine | Replicas | None, flight: Flight | None) -> None:
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

    def _reap_orphans(self) -> None:
        owned = {child.pid: child for child in self.children()}

        def reap(pid: int) -> bool:
            if pid in owned:
                owned[pid].process.reap()  # its Exited event follows, or is in the queue already
            return pid in owned or any(child.reap(pid) for child in list(self.context.short_lived))

        for pid in orphans.reap_orphans(reap):
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

    # --- actions ---------------------------------------------------------------------------------------------------
    def _announce(self) -> None:
        context = self.context
        context.events.add(
            "start", f"lightllmd {__version__}, pid {self.pid}, configuration {self.config_file or '(flags)'}"
        )
        context.log.own("info", f"listening on {', '.join(self.urls)}; control socket {context.runtime.control_socket}")
        for warning in context.config.warnings:
            context.events.add("warning", warning, level="warning")
        if context.activated and context.config.http.unix_socket:
            ignored = f"{context.config.http.unix_socket} is not listened on: the .socket unit alone says on what"
            context.events.add("warning", ignored, level="warning")
        exposed = [
            url for url, sock in zip(self.urls, context.listeners, strict=True) if http_listeners.beyond_loopback(sock)
        ]
        if exposed and not context.config.http.api_keys_file:
            context.events.add(
                "warning",
                f"{', '.join(exposed)} can be reached from other hosts and asks for no key: set [http] api_keys_file",
                level="warning",
            )

    def _first_readiness(self) -> None:
        assert self.plan is not None
        self.served_since = time.time()
        taken = self.served_since - self.started
        self.context.events.add("ready", f"serving {self.plan.model_name} {taken:.1f} s after the start")
        self._systemd.ready()

    def _give_up(self, why: str, code: int) -> None:
        """It never came to serve and never will with this plan: the daemon ends with that code."""
        self._exit_code = code
        for line in why.splitlines():
            self.context.events.add("stop", line, level="error")
        self.verbs.stop(Caller(), now=True)

    def _finished(self) -> bool:
        return self.verbs.ending and not self.children()

    def _kill_the_rest(self) -> None:
        for child in self.children():
            child.kill("stopped")

    # --- sources of events -------------------------------------------------------------------------------------
    async def _tick_for_ever(self) -> None:
        while True:
            self.context.post(Ticked())
            await asyncio.sleep(TICK)
