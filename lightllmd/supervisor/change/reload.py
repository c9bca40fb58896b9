"""A changed configuration file, taken up while requests go on: prepared and proven first, then in force, or nothing."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from lightllmd.config import tls
from lightllmd.config.diff import Change, blend, diff
from lightllmd.config.parameters import Config
from lightllmd.config.plan import Plan
from lightllmd.config.resolve import resolve
from lightllmd.config.stamps import differing, touched
from lightllmd.config.tls import TlsInvalid, TlsPair
from lightllmd.errors import ConfigInvalid, ControlError, LightllmdError, Problem, RolledBack, SystemFailure
from lightllmd.supervisor.change import planning
from lightllmd.supervisor.change.certificate import CertificateInForce
from lightllmd.supervisor.change.handover import Steps, Waiting, describe, fraction
from lightllmd.supervisor.change.settings import Settings
from lightllmd.supervisor.change.switch import Switch, await_background
from lightllmd.supervisor.children.child import Child
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.host import listeners as http_listeners
from lightllmd.supervisor.host import unix_listener
from lightllmd.supervisor.workers.api_workers import Api, ApiWorkers
from lightllmd.supervisor.workers.engines import Engines

REPLICAS = "engine.replicas"
RESTORE_TRIES = 3  # to bring a process of the old settings up
_SHOWN = 3  # names of files in a message


class Reload:
    """Steps of one reload. `details` are the job's. `switch_to` makes a `Switch` to a configuration, `in_force` puts
    one in force as far as it needs no new process, `relisten` changes the listeners of api workers to come."""

    def __init__(
        self,
        context: Context,
        engines: Engines,
        front: ApiWorkers,
        settings: Settings,
        certificate: CertificateInForce,
        details: dict[str, Any],
        switch_to: Callable[[Config, dict[str, Any]], Switch],
        in_force: Callable[[Config], None],
        relisten: Callable[[list[socket.socket]], None],
    ) -> None:
        self._context, self._engines, self._front = context, engines, front
        self._settings, self._certificate = settings, certificate
        self._details = details
        self._switch_to, self._in_force, self._relisten = switch_to, in_force, relisten
        self._before: dict[Api, Child | None] = {}  # what served before the front end was touched

    def steps(self, dry_run: bool) -> Steps:
        """The whole reload; under `dry_run` what it would do is found out and nothing is done. Raises ConfigInvalid and
        DoesNotFit with nothing touched, RolledBack with all as before, ControlError where that failed in part."""
        written, pair = yield from await_background(
            self._context,
            self._context.file_threads.run("reading the configuration", self._reread),
            "reading the configuration",
        )
        old, new = self._context.config, self._settings.after(written)
        before_pair = self._context.tls
        changes = [*diff(old, new), *(yield from self._changed_files(new))]
        if before_pair and pair and before_pair != pair and old.http.tls_files == new.http.tls_files:
            was, now = (f"valid until {one.until}" for one in (before_pair, pair))
            changes.append(Change("http.tls_certificate", was, now, "live"))
        resizes = self._resizes(new, changes)
        if resizes:
            changes = [
                msgspec.structs.replace(change, reload="live") if change.key == REPLICAS else change
                for change in changes
            ]
        self._details["changes"] = [msgspec.to_builtins(change) for change in changes]
        if not changes:
            self._settings.take(written)
            return "nothing changed"
        engine = any(change.reload == "engine" for change in changes)
        # A new engine's revision brings its name along: until it is committed the old one's is the true one.
        with_engine = ("http.served_model_name",) if engine else ()
        front_end = [change for change in changes if change.reload == "front end" and change.key not in with_engine]
        if dry_run:
            if engine:
                yield from self._switch_to(new, self._details).plan()
            return f"{len(changes)} changed, nothing was done"
        before = self._context.listeners
        # Alone first: an engine that fails later leaves nothing changed, since the old front end can come back.
        between = blend(old, new, front_end)
        listeners = self._listen(between) if front_end else before
        try:
            if front_end:
                yield from self._replace_front_end(between, listeners, pair)
            if engine:
                yield from self._switch_to(new, self._details).steps()
            elif resizes:
                yield from self._resize(between, new)
            else:
                self._in_force(new)
        except Exception:
            if front_end:
                yield from self._restore_front_end(old, before, before_pair)
            raise
        self._certificate.put_in_force(pair)
        for warning in written.warnings:
            self._context.events.add("warning", warning, level="warning")
        self._close(listener for listener in before if listener not in listeners)
        self._settings.take(written)
        return f"in force: {', '.join(change.key for change in changes)}"

    def _resizes(self, new: Config, changes: Sequence[Change]) -> bool:
        """Whether engines come or go and no other has to change: each would be planned as those that serve are."""
        if [change.key for change in changes if change.reload == "engine"] != [REPLICAS]:
            return False
        serving = self._engines.serving
        if serving.plan is None or serving.facts is None:
            return False
        try:
            plan = resolve(new, serving.facts, self._settings.invocation.config_file)
        except LightllmdError:
            return False  # from newer facts it may do; else those say why not
        return _of_one(plan) == _of_one(serving.plan)

    def _resize(self, old: Config, new: Config) -> Waiting[None]:
        """Raises RolledBack where an engine that comes does not come up; none of the others noticed anything."""
        self._in_force(new)
        coming = [engine for engine in self._engines.serving.engines if not engine.worker.starts]
        for engine in coming:
            engine.on_trial = True
            engine.worker.start()
        while waiting := [engine for engine in coming if not engine.ready]:
            failed = next((engine for engine in waiting if engine.child is None), None)
            if failed is not None:
                cause = failed.worker.trouble
                self._in_force(old)
                raise RolledBack(f"{failed.worker.name} failed: {cause}; the others serve on", cause=cause)
            yield f"starting {waiting[0].worker.name}: {describe(waiting[0].worker)}", fraction(waiting[0].worker)
        for engine in coming:
            engine.on_trial = False

    def _changed_files(self, config: Config) -> Waiting[list[Change]]:
        """Files of the served model that are not as its plan was made from. Raises LightllmdError where they can't be
        served."""
        plan = self._engines.serving.plan
        model = plan.model if plan else None
        if model is None or config.params.model_dir != self._context.config.params.model_dir:
            return []
        look = "looking at the model's files"
        if not (
            yield from await_background(
                self._context, self._context.file_threads.run(look, touched, model.stamps), look
            )
        ):
            return []
        facts = yield from await_background(
            self._context,
            planning.facts_of(self._context, config, self._settings.invocation.config_file),
            "reading the model's headers",
        )
        names = [os.path.basename(path) for path in differing(model.stamps, facts.model.stamps if facts.model else [])]
        if not names:
            return []
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return [Change("model_dir", "the files as planned", f"changed: {', '.join(names[:_SHOWN])}{more}", "engine")]

    def _listen(self, config: Config) -> list[socket.socket]:
        """Its listeners; those of the present ones that fit are among them. Raises SystemFailure."""
        before, where = self._context.listeners, http_listeners.Where.of(config)
        if self._context.activated or where == http_listeners.Where.of(self._context.config):
            return before
        # A port or path that another process holds is not waited for, in this loop.
        return http_listeners.listen(where, before, patience=0)

    def _reread(self) -> tuple[Config, TlsPair | None]:
        """In a thread. Raises ConfigInvalid."""
        written = self._settings.reread()
        try:
            return written, tls.read_named(written.http.tls_files)
        except TlsInvalid as fault:  # changed since it was checked
            raise ConfigInvalid([Problem(fault.setting, fault.message)]) from None

    def _replace_front_end(self, config: Config, listeners: list[socket.socket], pair: TlsPair | None) -> Waiting[None]:
        """Every api worker by one of this configuration, one after the other; then places are opened or closed. Raises
        RolledBack, which is still to be done then."""
        self._before = {api: api.worker.child for api in self._front.apis}
        self._begin(config, listeners, pair)
        workers = config.http.workers
        for api in self._front.apis[:workers]:
            yield from self._replace(api)
            if api.roll_failure or not api.worker.ready:
                raise self._failed(api, api.roll_failure or api.worker.trouble)
        self._front.resize(workers)
        for api in self._front.apis[len(self._before) :]:
            while not api.worker.ready:
                if api.worker.last_exit is not None:
                    raise self._failed(api, api.worker.trouble)
                yield f"starting {api.worker.name}", None

    @staticmethod
    def _failed(api: Api, why: str) -> RolledBack:
        cause = f"the new process of {api.worker.name} failed: {why}"
        return RolledBack(f"{cause}; the front end is as it was", cause=cause)

    def _restore_front_end(self, config: Config, listeners: list[socket.socket], pair: TlsPair | None) -> Waiting[None]:
        """The same back again, whatever the host refuses. A process that was not replaced is left alone, and none that
        serves is given up before another does. Raises ControlError where a process of the new settings has to go on,
        or none comes up."""
        given_up = [listener for listener in self._context.listeners if listener not in listeners]
        unix = http_listeners.Where.of(config).unix
        if unix is not None and not self._context.activated:
            with contextlib.suppress(SystemFailure):  # said when it was bound
                unix_listener.permit(unix)
        self._begin(config, listeners, pair)
        faults = []
        for api, before in self._before.items():
            if api not in self._front.apis or (before is not None and api.worker.child is before):
                continue
            yield from self._replace(api, tries=RESTORE_TRIES)
            if api.roll_failure and given_up:  # what serves listens where no client is to be answered any more
                api.renew()
                yield from self._replaced(api)
            elif api.roll_failure:
                api.keep_outdated()
                faults.append(f"{api.worker.name} goes on with the new settings for now: {api.roll_failure}")
        self._front.resize(config.http.workers)
        for api in self._front.apis:
            yield from self._replaced(api)
            if not api.worker.ready:
                faults.append(f"{api.worker.name} does not come back with the old settings: {api.worker.trouble}")
        self._close(given_up)
        if faults:
            raise ControlError("; ".join(faults))

    def _begin(self, config: Config, listeners: list[socket.socket], pair: TlsPair | None) -> None:
        """For what starts from now on."""
        self._in_force(config)
        self._context.tls = pair
        if listeners is not self._context.listeners:
            self._relisten(listeners)

    def _replace(self, api: Api, tries: int = 1) -> Waiting[None]:
        clock, pause = self._context.clock, self._context.config.supervisor.backoff_initial
        for failed in range(tries):
            again = clock.now + (pause * 2 ** (failed - 1) if failed else 0)
            while clock.now < again:
                yield f"waiting for the next try to replace {api.worker.name}", None
            api.roll()
            yield from self._replaced(api)
            if not api.roll_failure:
                return

    def _replaced(self, api: Api) -> Waiting[None]:
        while api.rolling and not (api.worker.limited or api.worker.fatal):
            yield f"replacing {api.worker.name}", None

    def _close(self, listeners: Iterable[socket.socket]) -> None:
        for listener in listeners:
            self._context.fd_store.forget([listener])
            http_listeners.close([listener])


def _of_one(plan: Plan) -> tuple[object, ...]:
    """What is planned for each engine, however many there are; of their devices the first engine's."""
    return (
        plan.ranks,
        plan.devices[: plan.ranks],
        plan.max_total_token_num,
        plan.batch_max_tokens,
        [budget.taken for budget in plan.budgets_of(0).values()],
    )
