"""The main loop of a generation's rank 0: one thread that takes requests in, lets the scheduler decide, runs steps and
sends tokens out.

Heartbeats go through this same loop, so a loop that is stuck falls silent. While nothing runs it sleeps in poll; while
a step is out and there is nothing to launch it waits in the runner.
"""

from __future__ import annotations

import gc
import logging
import math
import sys
import time
from collections import deque
from functools import partial
from pathlib import PurePath
from typing import NoReturn

import zmq

from lightllmd import errors
from lightllmd.config.parameters import FakeSettings
from lightllmd.config.plan import Plan
from lightllmd.engine.backends import grammars_for, runner_for, scheduler_for
from lightllmd.engine.grammar_gate import GrammarGate, Refused, Waiting
from lightllmd.engine.grammar_vocabulary import compiler_of
from lightllmd.engine.images.client import EmbeddingClient
from lightllmd.engine.images.gate import ImageGate, WithImages
from lightllmd.engine.images.prompt_images import PromptImages
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.ranks.guard import end_process
from lightllmd.engine.ranks.leading import LeadingRunner, lead
from lightllmd.engine.ranks.member import Member
from lightllmd.engine.runners import fake
from lightllmd.engine.scheduling.sequence import SELF, Owner
from lightllmd.engine.scheduling.submissions import RETRY_AFTER
from lightllmd.engine.step import Row, Runner, Step
from lightllmd.ipc import messages
from lightllmd.ipc.bus import EngineSocket
from lightllmd.ipc.channel import Channel
from lightllmd.ipc.flight_record import Flight, FlightRecorder
from lightllmd.ipc.images import visual_path
from lightllmd.observe.metrics import EngineMetrics
from lightllmd.observe.stats import Statistics

HEARTBEAT = 0.25  # seconds, for Load too; the supervisor expects a sign of life every 0.5 s

log = logging.getLogger(__name__)


def _goes_on(row: Row) -> bool:
    """It feeds its newest token, as a decode row does."""
    return not row.enters and row.position > 0 and len(row.tokens) == 1


class EngineWorker:
    """One rank 0. Owns the scheduler, the runner and the socket to the api workers."""

    def __init__(
        self, link: Channel[messages.Down], recorder: FlightRecorder, configure: messages.EngineConfigure, plan: Plan
    ) -> None:
        self._link = link
        self._recorder = recorder
        self._configure = configure
        self._generation = configure.generation
        self._endpoint = configure.endpoint
        self._plan = plan
        self._grammars = grammars_for(plan)
        self._gate = GrammarGate(self._grammars, lambda: compiler_of(plan))
        self._visual: EmbeddingClient | None = None
        if plan.vision is not None:
            path = visual_path(str(PurePath(configure.endpoint.removeprefix("ipc://")).parent), configure.revision)
            self._visual = EmbeddingClient(path, plan.vision.data_type, plan.vision.token_bytes)
        self._images = ImageGate(plan, self._visual)
        self._scheduler = scheduler_for(plan, configure.generation, self._grammars)
        params, engine = plan.config.params, plan.config.engine
        self._metrics = EngineMetrics(configure.replica, plan.replicas)
        self._statistics = Statistics(math.inf if params.disable_log_stats else plan.log_stats_interval)
        # The defaults set no pace and no fault.
        settings = engine.fake if engine.backend == "fake" else FakeSettings()
        self._pace, self._faults = fake.Pace(settings), fake.Faults(settings, params.model_dir or "", rank=0)
        self._runner: Runner
        self._loop: StepLoop
        self._socket: EngineSocket
        self._peers: set[Owner] = set()  # who is told the Load
        self._phase, self._progress, self._total = "boot", 0, 0
        self._entered = time.monotonic()  # the phase
        self._tokens_out = 0
        self._flushes = self._flushed_tokens = 0  # of the prompt cache, since the start
        self._next_beat = 0.0  # monotonic seconds
        self._next_load = 0.0
        self._told: messages.Load | None = None  # the last Load sent
        self._recorded: Flight | None = None  # what the flight record says; its step is the first of several alike
        self._begun: deque[float] = deque()  # monotonic seconds at which each step that is out was launched
        self._completed = 0.0  # monotonic seconds at which the newest completed step was
        self._pending: list[messages.Down] = []  # read from the channel in the middle of a step

    # --- life ------------------------------------------------------------------------------------------------
    def run(self) -> NoReturn:
        """Ends by SystemExit (Stop, SIGTERM, a supervisor that is gone) or by the error that it can't go on with."""
        self._enter("boot")
        self._faults.at_boot()
        try:
            self._socket = EngineSocket(self._endpoint)
        except zmq.ZMQError as refused:
            raise errors.SystemFailure(f"can't listen on {self._endpoint}: {refused}") from refused
        try:
            self._runner = self._make_runner()
            self._loop = StepLoop(self._scheduler, self._runner, self._launching)
            try:
                self._enter("load")
                self._runner.load(self._plan, self._load_progress)
                self._get_ready()
                self._faults.when_ready()
                self._serve()
            finally:
                self._runner.unstage()  # or its thread would go on
                if isinstance(self._runner, LeadingRunner):
                    self._runner.close()
        finally:
            if self._visual is not None:
                self._visual.close()
            self._socket.close()

    def _make_runner(self) -> Runner:
        if self._configure.ranks == 1:
            return runner_for(self._plan, Member(device=self._configure.device))
        return lead(self._plan, self._configure, partial(runner_for, self._plan), end_process, self._layer)

    def _get_ready(self) -> None:
        """From loaded weights on."""
        self._enter("warmup")
        self._runner.prepare(self._layer)
        self._warm_up()
        # What is here now stays: the collector need not look at it again, in the middle of some step.
        gc.collect()
        gc.freeze()
        self._enter("ready")
        if taken := self._runner.memory_stats():
            log.info("%s", ", ".join(f"{name} {value / 1e6:,.0f} MB" for name, value in taken.items()))

    def _fall_asleep(self) -> None:
        """What is still here is dropped: the api workers were told that this generation is down."""
        self._enter("sleep")
        self._gate.clear()
        self._images.clear()
        self._scheduler.clear()
        while self._loop.busy:
            self._turn()
        self._peers.clear()
        gc.unfreeze()
        self._runner.release(self._load_progress)
        self._enter("asleep")

    def _wake(self) -> None:
        self._enter("load")
        self._runner.restore(self._load_progress)
        self._told = None
        self._get_ready()

    def _warm_up(self) -> None:
        """A request of our own, through the scheduler and the runner: one prefill and one decode make real tokens, or
        one prefill a real vector."""
        prompt = list(range(min(4, self._plan.vocab_size, self._plan.max_total_token_num - 3)))
        params: messages.RequestParams = messages.SamplingParams(max_new_tokens=2, ignore_eos=True, use_cache=False)
        if not self._plan.generates:
            params = messages.PoolingParams(use_cache=False)
        own = messages.Submit(0, *SELF, time.monotonic_ns(), prompt, params, branches=[0], emitted=[[]])
        refused = self._scheduler.submit(own)
        if refused:
            raise errors.EngineError(f"the engine refuses its own warm-up request: {refused.message}")
        while self._loop.busy:
            self._turn()

    def _serve(self) -> NoReturn:
        poller = zmq.Poller()
        poller.register(self._socket.socket, zmq.POLLIN)
        poller.register(self._link, zmq.POLLIN)
        poller.register(self._gate.fileno(), zmq.POLLIN)
        if self._visual is not None:
            poller.register(self._visual.fileno(), zmq.POLLIN)
        while True:
            for source, _ in poller.poll(self._sleep()):
                if source is self._socket.socket:
                    for message in self._socket.receive():
                        self._hear_api(message)
                elif source == self._gate.fileno():
                    self._take_compiled()
                elif source == self._link.fileno():
                    self._read_link()
            self._hear_supervisor()
            now = time.monotonic()
            if self._visual is not None:
                self._take_seen(now)
            if self._loop.busy and not self._pace.delay(now):
                self._turn()
            if now >= self._next_beat:
                self._beat(now)
            if not self._loop.busy:
                self._statistics.idle()
                self._expire_unseen(now)
                self._tell_load(now)
            elif now >= self._next_load:
                for owner, expired in self._scheduler.expire(now):
                    self._socket.send(*owner, expired)
                self._expire_unseen(now)
                self._tell_load(now)

    def _sleep(self) -> int:
        """Milliseconds until there is something to do of our own accord, rounded up. A step that is out is something to
        do: the pace of the fake back end alone puts it off, which then stands for the time that a device takes."""
        now = time.monotonic()
        wait = min(self._next_beat, self._images.due) - now
        if self._loop.busy:
            wait = min(wait, self._pace.delay(now))
        return max(0, math.ceil(wait * 1000))

    # --- steps -----------------------------------------------------------------------------------------------
    def _turn(self) -> None:
        """Launches a step, if the scheduler has one; sends what the one before it made."""
        outputs = self._loop.turn(self._layer, self._beat_if_due)
        step = self._loop.completed
        if step is None:
            return
        if step.rows or not self._loop.busy:
            # Its requests have a token each. Before it is sent, so that no request is suspected whose client has one.
            self._record(step)
        for owner, output in outputs.items():
            if output.broken:
                log.error("step %d: the model's logits are not numbers (NaN)", step.number)
            if owner != SELF:
                self._socket.send(*owner, output)
            elif output.broken:
                raise errors.EngineError(
                    "the model's logits are not numbers (NaN): this data_type is too narrow for it"
                )
        for owner, refused in self._scheduler.take_refused():
            self._socket.send(*owner, refused)
        ended = time.monotonic()
        self._progress += 1
        generated = sum(len(output.tokens) for output in outputs.values())
        if SELF not in outputs or self._phase != "ready":
            # Served, or made to get ready; an own request has its step for itself.
            self._tokens_out += generated + sum(len(output.pooled) for output in outputs.values())
        self._pace.ran(step, ended, idle=not self._loop.busy)
        # It had the device to itself from the end of the step before it.
        begun = max(self._begun.popleft(), self._completed)
        self._completed = ended
        if self._phase == "ready":
            self._count(step, generated, ended - begun, ended)

    def _launching(self, step: Step) -> None:
        """Right before a step's launch."""
        now = time.monotonic()
        self._begun.append(now)
        self._record(step)
        if step.rows and self._phase == "ready":
            for arrival_ns in self._scheduler.first_admitted:
                self._metrics.admitted(max(0.0, now - arrival_ns * 1e-9))

    def _record(self, step: Step) -> None:
        """Leaves for the supervisor what this process is doing, should it not come back: the newest step that is out
        (none: `step` was the last), and who could be to blame in any that is.

        Requests are unproven as long as a part of their prompt is out.
        """
        out = self._loop.out
        flight = Flight(step.number)
        if out:
            unproven = list(dict.fromkeys(row.request for step in out for row in step.rows if not _goes_on(row)))
            quarantined = self._scheduler.quarantined if len(out) == 1 else 0
            flight = Flight(out[-1].number, out[-1].kind, out[-1].size, out[-1].fed, unproven, quarantined)
        known = self._recorded
        alike = ("kind", "rows", "unproven", "quarantined")
        if known and all(getattr(known, name) == getattr(flight, name) for name in alike):
            return
        self._recorder.write(flight)
        self._recorded = flight

    def _count(self, step: Step, generated: int, seconds: float, now: float) -> None:
        begun = sum(row.enters and not row.position for row in step.rows)
        self._metrics.step(step.kind, seconds, begun)
        fed = sum(len(row.tokens) for row in step.rows if not _goes_on(row))
        if self._statistics.count(fed, generated, now):
            load = self._scheduler.load()
            log.info(
                "%s; running %d, waiting %d, paused %d, slots %d of %d",
                self._statistics.line(now),
                *(load.running, load.waiting, load.paused, load.slots_used, load.slots_total),
            )

    # --- messages ----------------------------------------------------------------------------------------------
    def _hear_api(self, message: messages.ToEngine) -> None:
        match message:
            case messages.Submit() | messages.Hello() if self._phase == "asleep":
                pass  # sent before it was told; it connects again when this generation is back
            case messages.Submit():
                now = time.monotonic()
                if len(self._gate) >= self._plan.config.http.max_queue and not message.replay:
                    text = f"the queue is full: {len(self._gate)} requests wait for their grammars to be compiled"
                    self._reject(message, "queue_full", text)
                elif not self._gate.holds(message, now):
                    self._submit(Waiting(message, now))
            case messages.Abort():
                self._gate.abort(message.request, message.branches)
                self._images.abort(message.request, message.branches)
                self._scheduler.abort(message.request, message.branches)
            case messages.Hello():
                self._peers.add((message.api, message.epoch))
                self._told = None

    def _submit(self, one: Waiting) -> None:
        """To the scheduler, once its images are here."""
        message = one.message
        if not message.images:
            self._schedule(one)
        elif len(self._images) >= self._plan.config.http.max_queue and not message.replay:
            text = f"the queue is full: {len(self._images)} sequences wait for their images to be encoded"
            self._reject(message, "queue_full", text)
        else:
            opened = self._images.open(one, time.monotonic())
            if opened is not None:
                self._open(opened)

    def _take_seen(self, now: float) -> None:
        """Requests whose images are here by now go to the scheduler."""
        for opened in self._images.take(now):
            self._open(opened)

    def _open(self, opened: WithImages | Refused) -> None:
        if isinstance(opened, Refused):
            self._reject(opened.message, "invalid", opened.why)
        else:
            self._schedule(opened.waiting, opened.images)

    def _expire_unseen(self, now: float) -> None:
        for message, why in self._images.expire(now):
            self._reject(message, "queue_timeout", why)

    def _schedule(self, one: Waiting, images: PromptImages | None = None) -> None:
        rejected = self._scheduler.submit(one.message, one.since, one.rows, images)
        if rejected:
            self._socket.send(one.message.api, one.message.epoch, rejected)

    def _take_compiled(self) -> None:
        """Requests whose grammars are compiled by now go to the scheduler."""
        for one in self._gate.take():
            if isinstance(one, Refused):
                self._reject(one.message, "invalid", one.why)
            else:
                self._submit(one)

    def _reject(self, message: messages.Submit, reason: str, text: str) -> None:
        after = None if reason == "invalid" else RETRY_AFTER
        rejected = messages.Rejected(self._generation, message.request, reason, text, after)
        self._socket.send(message.api, message.epoch, rejected)

    def _read_link(self) -> None:
        """Takes in what the supervisor says. Ends the process at once when it says so, or is gone."""
        for message in self._link.receive():
            if isinstance(message, messages.Stop):
                sys.exit(errors.EXIT_OK)
            self._pending.append(message)
        if self._link.closed:
            sys.exit(errors.EXIT_OK)

    def _hear_supervisor(self) -> None:
        """Acts on what was read; only between steps, since it changes what the scheduler has."""
        pending, self._pending = self._pending, []
        for message in pending:
            match message:
                case messages.ApiGone():
                    self._gate.api_gone((message.api, message.epoch))
                    self._images.api_gone((message.api, message.epoch))
                    self._scheduler.api_gone(message.api, message.epoch)
                    self._peers.discard((message.api, message.epoch))
                case messages.Stage() if self._phase == "ready":
                    self._runner.stage()
                case messages.Sleep() if self._phase == "ready":
                    self._fall_asleep()
                case messages.Wake():
                    if self._phase == "asleep":
                        self._wake()
                    else:
                        self._runner.unstage()
                case messages.FlushCache():
                    self._flushes += 1
                    self._flushed_tokens += self._scheduler.flush_cache()
                    self._beat(time.monotonic())  # which answers the command that waits for it
                case messages.Tune():
                    logging.getLogger().setLevel(message.log_level.upper())
                    self._statistics = Statistics(message.log_stats_interval)

    # --- signs of life -------------------------------------------------------------------------------------------
    def _enter(self, phase: str) -> None:
        now = time.monotonic()
        log.debug("%s after %.2f s of %s", phase, now - self._entered, self._phase)
        self._phase, self._progress, self._total, self._entered = phase, 0, 0, now
        self._beat(now)

    def _load_progress(self, done: int, total: int) -> None:
        self._progress, self._total = done, total
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
        load = self._load()
        stats: dict[str, float] = {
            "tokens_out": self._tokens_out,
            "slots_total": load.slots_total,
            "slots_used": load.slots_used,
            "running": load.running,
            "waiting": load.waiting,
            "paused": load.paused,
        }
        if cache := self._scheduler.cache_stats():
            self._metrics.cache(cache)
            stats |= {**cache, "cache_flushes": self._flushes, "cache_flushed_tokens": self._flushed_tokens}
        self._metrics.of_replica(stats)
        if self._grammars.ready:
            gate = self._gate
            self._metrics.grammars(gate.compiled, gate.seconds, self._grammars.hits, self._grammars.size)
        if self._phase in ("ready", "sleep", "asleep"):
            stats |= self._runner.memory_stats()
        busy = self._phase not in ("ready", "asleep") or self._loop.busy
        self._link.send(messages.Heartbeat(self._phase, self._progress, busy, self._total, stats), droppable=True)

    def _load(self) -> messages.Load:
        load = self._scheduler.load()
        load.waiting += len(self._images)
        return load

    def _tell_load(self, now: float) -> None:
        """To all api workers, when it changed: a few times a second while busy, at once when idle."""
        self._next_load = now + HEARTBEAT
        load = self._load()
        if load == self._told:
            return
        self._told = load
        peak_tokens = round(load.estimated_peak * load.slots_total)
        self._metrics.load(load.running, load.waiting, load.paused, peak_tokens)
        for peer in self._peers:
            self._socket.send(*peer, load)
