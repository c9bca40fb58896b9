"""The mutations: restart, reload, swap, drain, resume, reset-failed, flush-cache, stop. Each is a job that the
single-writer loop steps."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightllmd.config import keys
from lightllmd.config.diff import diff
from lightllmd.config.parameters import Config
from lightllmd.config.resolve import resolve
from lightllmd.errors import (
    Busy,
    ConfigInvalid,
    ControlError,
    LightllmdError,
    PromptCacheOff,
    RolledBack,
    StaleGeneration,
    TryAgain,
)
from lightllmd.ipc.messages import Drain, FlushCache, Keys, Models, Resume, Tune
from lightllmd.supervisor.change.certificate import CertificateInForce
from lightllmd.supervisor.change.handover import Steps, Terms, describe, fraction
from lightllmd.supervisor.change.reload import Reload
from lightllmd.supervisor.change.settings import Settings
from lightllmd.supervisor.change.switch import Switch
from lightllmd.supervisor.children.crashes import words
from lightllmd.supervisor.children.worker import Worker
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.control.jobs import Jobs, RunningJob
from lightllmd.supervisor.control.targets import Targets
from lightllmd.supervisor.journal.logs import renderer
from lightllmd.supervisor.workers.api_workers import ApiWorkers
from lightllmd.supervisor.workers.engines import Engines
from lightllmd.supervisor.workers.pusher import Pusher

DRY_RUN = "dry run"  # the target of such a reload
REPLAN = "without lost GPUs"  # of one that the daemon asks for itself


@dataclass(frozen=True)
class Caller:
    """Who asks for a mutation, and on which premise."""

    uid: int | None = None  # None: the daemon itself, because of a signal
    pid: int | None = None
    if_match: int | None = None  # the engine generation that the asker saw


class Verbs:
    """What gates a mutation is decided here, inside the loop: at most one of them runs, and a stop overrides all."""

    def __init__(
        self,
        context: Context,
        engines: Engines,
        front: ApiWorkers,
        pusher: Pusher,
        settings: Settings,
        certificate: CertificateInForce,
        relisten: Callable[[list[socket.socket]], None],
    ) -> None:
        self._context, self._engines, self._front, self._pusher = context, engines, front, pusher
        self._settings, self._certificate, self._relisten = settings, certificate, relisten
        self.jobs = Jobs()
        self._steps: dict[int, Steps] = {}  # by job number
        self.draining = False  # new requests are refused; also while stopping
        self.drained = False  # ... and none is left
        self.stopping: RunningJob | None = None
        self.ending = False  # the drain of a stop is over: the workers are to end now
        self._stop_now = False

    # --- verbs ---------------------------------------------------------------------------------------------------
    def restart(self, asked: Caller, target: str = "") -> RunningJob:
        """A new process for the engine and for each api worker, or for `target`. Raises NoSuchWorker."""
        self._gate(asked)
        self._check_planned()
        return self._open("restart", asked, self._restart(self._targets(target)), target)

    def reload(self, asked: Caller, dry_run: bool = False) -> RunningJob:
        """Takes up the configuration file and the model's files, or tells what that would change."""
        self._gate(asked)
        self._check_planned()
        details: dict[str, Any] = {}
        reload = Reload(
            self._context,
            self._engines,
            self._front,
            self._settings,
            self._certificate,
            details,
            switch_to=lambda config, details: self._switch(config, Terms(), details),
            in_force=self.put_in_force,
            relisten=self._relisten,
        )
        return self._open("reload", asked, reload.steps(dry_run), DRY_RUN if dry_run else "", details)

    def replan(self) -> bool:
        """A plan of the configuration in force is made from fresh facts, and put in the place of one that can't serve
        any more. False: not now, since another job goes on."""
        if self.jobs.running() or self.draining or self.ending:
            return False
        details: dict[str, Any] = {}
        switch = self._switch(self._context.config, Terms(after=True), details)
        self._open("reload", Caller(), switch.steps(), REPLAN, details)
        return True

    @property
    def reloading(self) -> bool:
        """Whether a reload that changes something is under way."""
        return any(job.snapshot.target != DRY_RUN for job in self.jobs.running("reload"))

    def swap(self, asked: Caller, model: str, terms: Terms, plan_only: bool = False) -> RunningJob:
        """Serves `model` instead, or plans that. Raises NoSuchModel."""
        self._gate(asked)
        self._check_planned()
        config = self._settings.for_model(self._settings.written, model)
        details: dict[str, Any] = {}
        switch = self._switch(config, terms, details)
        same = not diff(self._context.config, config)
        return self._open("swap", asked, self._swap(switch, model, plan_only, same), model, details)

    def drain(self, asked: Caller) -> RunningJob:
        """Refuses new requests; done when none is in flight."""
        self._gate(asked)
        return self._open("drain", asked, self._drain())

    def resume(self, asked: Caller) -> RunningJob:
        """Accepts requests again; ends a drain."""
        self._gate(asked, overrides=("drain",))
        for job in self.jobs.running("drain"):
            self._cancel(job, "resumed")
        return self._open("resume", asked, self._resume())

    def reset_failed(self, asked: Caller, target: str = "") -> RunningJob:
        """Also while a restart or a drain waits: for the very worker, perhaps, whose failures are to be forgotten."""
        self._gate(asked, overrides=("restart", "drain"))
        self._check_planned()
        return self._open("reset-failed", asked, self._reset_failed(self._targets(target).workers), target)

    def flush_cache(self, asked: Caller) -> RunningJob:
        """Empties the prompt cache of what no request uses. Raises PromptCacheOff, TryAgain."""
        self._gate(asked, overrides=("drain",))
        self.check_cached()
        return self._open("flush-cache", asked, self._flush_cache())

    def check_cached(self) -> None:
        """Raises PromptCacheOff, and TryAgain where no engine has anything in its cache yet."""
        self._check_planned()
        plan = self._engines.serving.plan
        assert plan is not None
        if not plan.config.params.use_dynamic_prompt_cache:
            raise PromptCacheOff("there is no prompt cache: use_dynamic_prompt_cache = false")
        if not self._engines.serving.ready:
            raise TryAgain("no engine is ready: the prompt cache of the next one will be empty")

    def stop(self, asked: Caller, now: bool = False) -> RunningJob:
        """A second stop changes the first: `now` ends its drain."""
        self._check_premise(asked)
        self._stop_now = self._stop_now or now
        if self.stopping is None:
            for job in self.jobs.running():
                self._cancel(job, "the daemon stops")
            self.stopping = self._open("stop", asked, self._stop())
        return self.stopping

    def step(self) -> None:
        """After every event: each running job goes on as far as it can."""
        for number in list(self._steps):
            if number in self._steps:
                self._step(self.jobs.get(number))

    # --- what they do ------------------------------------------------------------------------------------------
    def _restart(self, targets: Targets) -> Steps:
        done = []
        for engine in targets.engines:
            worker = engine.worker
            old = worker.number
            engine.restart()
            while worker.number == old:
                yield f"ending generation {worker.number}", None
            while not worker.ready:
                self._fail_if_given_up(worker)
                yield f"starting generation {worker.number}: {describe(worker)}", fraction(worker)
            done.append(f"generation {worker.number} is ready")
        for api in targets.apis:
            api.roll()
            while api.rolling:
                self._fail_if_given_up(api.worker)
                yield f"replacing {api.worker.name}", None
            if api.roll_failure:
                raise ControlError(
                    f"the replacement of {api.worker.name} failed, the old one goes on: {api.roll_failure}"
                )
            done.append(f"{api.worker.name} was replaced")
        if targets.visual is not None:
            worker, old = targets.visual, targets.visual.number
            worker.reset_failures()
            if worker.child is not None:
                worker.child.terminate("restart requested")
            while worker.number == old or not worker.ready:
                self._fail_if_given_up(worker)
                yield f"replacing {worker.name}: {describe(worker)}", fraction(worker)
            done.append(f"{worker.name} was replaced")
        if targets.pusher is not None:
            worker = targets.pusher.worker
            old = worker.number
            targets.pusher.restart()
            while worker.number == old or not worker.ready:
                self._fail_if_given_up(worker)
                yield f"replacing {worker.name}", None
            done.append(f"{worker.name} was replaced")
        return "; ".join(done)

    def _switch(self, config: Config, terms: Terms, details: dict[str, Any]) -> Switch:
        file = self._settings.invocation.config_file
        return Switch(self._context, self._engines, self._front, config, file, terms, details, self.put_in_force)

    def _swap(self, switch: Switch, model: str, plan_only: bool, same: bool) -> Steps:
        """`same`: its configuration is the one in force."""
        serving = self._engines.serving
        if same and not serving.given_up:
            plan, facts = yield from switch.plan()
            if serving.facts is not None and facts.model == serving.facts.model:
                return f"{plan.model_name} is in force already; nothing was done"
        if plan_only:
            plan, _ = yield from switch.plan()
            return f"{plan.model_name} fits {switch.details['how']} the present one; nothing was done"
        try:
            done = yield from switch.steps()
        except ConfigInvalid as invalid:
            # Whatever is wrong with what was asked for: it failed, and nothing was touched.
            raise RolledBack(f"{invalid.message}; the old model serves on", cause=invalid.message) from invalid
        self._settings.swap_to(model)
        if self._settings.swapped_to is None:
            return done
        return f"{done}; when the daemon starts anew it serves {self._settings.own_model}, as its configuration says"

    def put_in_force(self, config: Config) -> None:
        """As far as it needs no new process. Raises ConfigInvalid, with nothing changed."""
        serving, file = self._engines.serving, self._settings.invocation.config_file
        if serving.plan is not None and serving.plan.config != config:
            assert serving.facts is not None
            serving.plan_for(resolve(config, serving.facts, file), serving.facts)
        self._context.config = config
        if serving.plan is None:
            return
        self._engines.in_force()
        self._engines.spares.keep()
        render = renderer(config.log.format, self._context.journal)
        self._context.log.configure(config.supervisor.log_lines, config.log.level, render)
        pace = math.inf if config.params.disable_log_stats else serving.plan.log_stats_interval
        tune = Tune(config.log.level, pace, config.supervisor.stop_timeout)
        engines = [child for engine in self._engines for child in engine.children]
        for child in (*self._front.children(), *engines, *self._pusher.children()):
            child.send(tune)
        self._pusher.in_force()
        self._front.tell(Keys(keys.encode(config.keys)))
        self._front.tell(Models(list(config.models)))

    def _drain(self) -> Steps:
        self._refuse_requests()
        while not self._front.idle:
            yield f"draining ({self._front.now('in_flight')} in flight)", None
        self.drained = True
        return "no request is in flight; new ones are refused until resume"

    def _resume(self) -> Steps:
        self.draining = self.drained = False
        self._front.tell(Resume())
        return "new requests are accepted"
        yield  # makes this a generator like the others

    def _reset_failed(self, workers: list[Worker]) -> Steps:
        done = []
        for worker in workers:
            if worker.child is None:
                done.append(f"{worker.name} starts again")
            elif worker.failures:
                done.append(f"{worker.name}: {len(worker.failures)} failed starts forgotten")
            worker.reset_failures()
        return "; ".join(done) or "there was nothing to forget"
        yield  # makes this a generator like the others

    def _flush_cache(self) -> Steps:
        """Engines count what they flushed in their heartbeats."""
        asked = [engine for engine in self._engines.serving.engines if engine.ready]
        befores = {}
        for engine in asked:
            child = engine.child
            assert child is not None
            befores[engine] = child, child.stats
            child.send(FlushCache())
        flushed, kept, ended = 0.0, 0.0, 0
        for engine, (child, before) in befores.items():
            while engine.child is child and child.stats["cache_flushes"] == before["cache_flushes"]:
                yield "waiting for the engine's present step", None
            if engine.child is not child:
                ended += 1
                continue
            flushed += child.stats["cache_flushed_tokens"] - before["cache_flushed_tokens"]
            kept += child.stats["cache_tokens"]
        if ended == len(asked):
            return "the engine ended meanwhile, and its prompt cache with it"
        return f"{flushed:.0f} tokens forgotten" + (f"; requests use {kept:.0f} more" if kept else "")

    def _stop(self) -> Steps:
        deadline = self._context.clock.now + self._context.config.supervisor.drain_timeout
        self._refuse_requests()
        while not (self._stop_now or self._front.idle or self._context.clock.now >= deadline):
            yield f"draining ({self._front.now('in_flight')} in flight)", None
        self.ending = True
        for child in self._front.children():
            child.stop("stopped")
        self._engines.stop("stopped")
        while any(self._front.children()) or self._engines.children():
            yield "ending the workers", None
        while True:
            self._pusher.stop("stopped", now=self._stop_now)
            yield "pushing metrics a last time", None

    def _refuse_requests(self) -> None:
        self.draining = True
        self._front.tell(Drain())
        self._front.drained_since_now()

    # --- bookkeeping ---------------------------------------------------------------------------------------------
    def _open(
        self, verb: str, asked: Caller, steps: Steps, target: str = "", details: dict[str, Any] | None = None
    ) -> RunningJob:
        job = self.jobs.open(verb, target, asked.uid, asked.pid, details)
        by = "" if asked.uid is None else f" by uid {asked.uid}, pid {asked.pid}"
        self._context.events.add("job", f"job {job.snapshot.id}: {verb}{' ' + target if target else ''} asked{by}")
        self._steps[job.snapshot.id] = steps
        self._step(job)
        return job

    def _step(self, job: RunningJob) -> None:
        steps = self._steps[job.snapshot.id]
        try:
            job.advance(*next(steps))
        except StopIteration as end:
            self._finish(job, "done", str(end.value))
        except RolledBack as failure:
            self._finish(job, "rolled-back", failure.message, failure.as_dict())
        except LightllmdError as failure:
            self._finish(job, "failed", failure.message, failure.as_dict())
        except Exception as fault:  # ours: this job has failed, the daemon goes on
            self._fail(job, fault)

    def _cancel(self, job: RunningJob, why: str) -> None:
        try:
            self._steps[job.snapshot.id].close()
        except Exception as fault:
            self._fail(job, fault)
        else:
            self._finish(job, "cancelled", why)

    def _fail(self, job: RunningJob, fault: Exception) -> None:
        failure = LightllmdError(words(fault))
        self._finish(job, "failed", failure.message, failure.as_dict())
        if job.snapshot.verb == "stop":
            raise fault  # the daemon ends all the same
        self._context.report_fault(f"job {job.snapshot.id}: {job.snapshot.verb}", fault)

    def _finish(self, job: RunningJob, outcome: str, message: str, error: dict[str, Any] | None = None) -> None:
        del self._steps[job.snapshot.id]
        job.finish(outcome, message, error)
        level = "info" if error is None else "error"
        text = f"job {job.snapshot.id}: {job.snapshot.verb} {outcome}: {message}"
        self._context.events.add("job", text, level=level)

    def _gate(self, asked: Caller, overrides: tuple[str, ...] = ()) -> None:
        self._check_premise(asked)
        for job in self.jobs.running():
            if job.snapshot.verb not in overrides:
                number, verb = job.snapshot.id, job.snapshot.verb
                raise Busy(f"job {number} ({verb}: {job.snapshot.phase}) is not finished", job=number)

    def _check_premise(self, asked: Caller) -> None:
        number = self._engines.serving.number
        if asked.if_match is not None and asked.if_match != number:
            raise StaleGeneration(f"generation {number} is in force, not {asked.if_match}", generation=number)

    def _check_planned(self) -> None:
        if not self._context.plan:
            raise TryAgain("the plan is not made yet: nothing has been started")

    def _targets(self, target: str) -> Targets:
        """Empty: all. Raises NoSuchWorker."""
        pusher = self._pusher if self._pusher.snapshot() is not None else None
        serving = self._engines.serving
        return Targets(serving.engines, self._front.apis, pusher, serving.visual).named(target)

    @staticmethod
    def _fail_if_given_up(worker: Worker) -> None:
        if worker.fatal is not None or worker.limited:
            raise ControlError(f"{worker.name} does not come up: {worker.last_exit.cause if worker.last_exit else ''}")
