"""The loop of the process that pushes: what the supervisor says, one push at a time, and when the next is due."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from typing import Any

from lightllmd.ipc import messages
from lightllmd.ipc.channel import Channel
from lightllmd.observe.metrics import PushMetrics, registry_of
from lightllmd.push.gateway import Attempt
from lightllmd.push.pace import LONGEST_WAIT, PushPace

log = logging.getLogger(__name__)

BEAT = 0.5  # seconds between heartbeats
PUSH_TIMEOUT = 10.0  # seconds for a push altogether; the gateway has half of it to accept the connection, or to answer
_AFTER_CUT = 0.2  # seconds that a push whose connection was closed is given to end


class PushWorker:
    """Serves until told to stop. A push that the gateway does not take is counted, and told once in an outage."""

    def __init__(
        self,
        channel: Channel[messages.Down],
        configure: messages.PushConfigure,
        push_timeout: float = PUSH_TIMEOUT,
    ) -> None:
        self._channel = channel
        self._push_timeout = push_timeout
        self._target = configure.target
        self._registry = registry_of(configure.metrics_dir)
        self._metrics = PushMetrics()
        self._pace = PushPace(self._target.interval)
        self._stopping = False
        self._told = asyncio.Event()  # the target changed, or it is to stop
        self._running: asyncio.Future[str] | None = None  # the last push, which may outlast its time
        self._pushes = self._failures = 0
        self._pushed_at: float | None = None  # Unix time of the last push that was taken

    async def run(self) -> None:
        """Pushes at once, then at the pace that the target says; a last time when it is told to stop."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._channel.fileno(), self._heard)
        beating = asyncio.create_task(self._beat())
        self._heard()
        try:
            while not self._stopping:
                self._told.clear()
                target, begun = self._target, loop.time()
                why = await self._push(target, self._push_timeout)
                if why is not None and target is self._target:
                    self._judge(why, loop.time())
                    await self._wait_until(begun + self._pace.wait(random.random()))
            await self._last_push()
        finally:
            beating.cancel()
            loop.remove_reader(self._channel.fileno())

    async def _wait_until(self, due: float) -> None:
        """Until then, or until something was told."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(due):
                await self._told.wait()

    async def _push(self, target: messages.PushTarget, limit: float) -> str | None:
        """Why it was not taken, empty where it was. None: it was broken off for something that was told meanwhile."""
        self._metrics.begun()
        self._pushes += 1
        why = await self._attempt(target, limit)
        if why:
            self._metrics.failed()
            self._failures += 1
        elif why is not None and target is self._target:
            self._pushed_at = time.time()
        self._heartbeat()
        return why

    async def _attempt(self, target: messages.PushTarget, limit: float) -> str | None:
        loop = asyncio.get_running_loop()
        late = loop.time() + limit
        if self._running is not None:
            await self._await(self._running, late)
            if self._running is not None:
                return None if self._told.is_set() else "the push before still looks up the gateway's name, or connects"
        self._running = ended = loop.create_future()

        def on_end(why: str) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is over
                loop.call_soon_threadsafe(self._ended, ended, why)

        attempt = Attempt(target, self._registry, limit / 2, on_end)
        attempt.start()
        await self._await(ended, late)
        if ended.done():
            return ended.result()
        why = None if self._told.is_set() else f"it took longer than {limit:g} s"
        attempt.cut()
        await asyncio.wait({ended}, timeout=_AFTER_CUT)
        return why

    async def _await(self, attempt: asyncio.Future[str], late: float) -> None:
        """Until it has ended, or something was told, or it is `late`."""
        told = asyncio.ensure_future(self._told.wait())
        waited: set[asyncio.Future[Any]] = {attempt, told}
        timeout = late - asyncio.get_running_loop().time()
        await asyncio.wait(waited, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()

    def _ended(self, attempt: asyncio.Future[str], why: str) -> None:
        self._running = None
        attempt.set_result(why)

    def _judge(self, why: str, now: float) -> None:
        where = group_name(self._target)
        if not why:
            if ended := self._pace.succeeded(now):
                failures, seconds = ended
                log.info("metrics are pushed to %s again, after %d failures in %.0f s", where, failures, seconds)
        elif self._pace.failed(now):
            longest = max(LONGEST_WAIT, self._target.interval)
            log.warning(
                "metrics can't be pushed to %s: %s; it is tried again, at least every %g s", where, why, longest
            )
        else:
            log.debug("metrics can't be pushed to %s: %s", where, why)

    async def _last_push(self) -> None:
        self._told.clear()
        where = group_name(self._target)
        if why := await self._push(self._target, messages.LAST_PUSH):
            log.warning("the last push of metrics to %s failed: %s", where, why)
        else:
            log.info("metrics were pushed a last time to %s, where they stay", where)

    # --- the supervisor ----------------------------------------------------------------------------------------------
    async def _beat(self) -> None:
        while True:
            self._heartbeat()
            await asyncio.sleep(BEAT)

    def _heartbeat(self) -> None:
        stats = {
            "pushes": float(self._pushes),
            "push_failures": float(self._failures),
            "failing": float(self._pace.failures > 0),
        }
        if self._pushed_at is not None:
            stats["pushed_at"] = self._pushed_at
        self._channel.send(messages.Heartbeat("ready", self._pushes, busy=False, stats=stats), droppable=True)

    def _heard(self) -> None:
        for message in self._channel.receive():
            match message:
                case messages.PushTarget():
                    self._retarget(message)
                case messages.Tune():
                    logging.getLogger().setLevel(message.log_level.upper())
                case messages.Stop():
                    self._stopping = True
                    self._told.set()
                case _:
                    log.error("a message that is not for the pushing process: %s", type(message).__name__)
        if self._channel.closed:
            self._stopping = True
            self._told.set()

    def _retarget(self, target: messages.PushTarget) -> None:
        before, after = group_name(self._target), group_name(target)
        if before != after:
            log.info("metrics are pushed to %s from now on; at %s they stay as they were pushed last", after, before)
            self._pushed_at = None
        self._target, self._pace = target, PushPace(target.interval)
        self._told.set()


def group_name(target: messages.PushTarget) -> str:
    """As an operator looks for it on the gateway."""
    labels = ", ".join(f'{key}="{value}"' for key, value in {"job": target.job, **target.grouping_key}.items())
    return f"{target.gateway} {{{labels}}}"
