"""The daemon's process: what has to be there before the loop runs, and what is cleared up after it."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import socket
import sys

from lightllmd.config import tls
from lightllmd.config.cli import Invocation
from lightllmd.config.parameters import Config
from lightllmd.config.tls import TlsInvalid, TlsPair
from lightllmd.errors import EXIT_FAILED, ConfigInvalid, LightllmdError, Problem
from lightllmd.ipc.signals import ignore_meaningless
from lightllmd.supervisor.change.settings import Settings
from lightllmd.supervisor.children.hang_rule import RunningClock
from lightllmd.supervisor.context import Commands, Context
from lightllmd.supervisor.host import listeners as http_listeners
from lightllmd.supervisor.host.fd_store import FdStore
from lightllmd.supervisor.host.notify import Notifier, is_journal
from lightllmd.supervisor.host.runtime_directory import RuntimeDirectory, control_socket_path
from lightllmd.supervisor.journal import logs
from lightllmd.supervisor.supervisor import ENDING, Supervisor


async def _until_the_end(supervisor: Supervisor) -> int:
    """Its exit code. No signal cuts off what is cleared up after it."""
    try:
        return await supervisor.run()
    finally:
        for number in ENDING:
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)


def _read_tls(config: Config) -> TlsPair | None:
    try:
        return tls.read_named(config.http.tls_files)
    except TlsInvalid as fault:  # changed since it was checked
        raise ConfigInvalid([Problem(fault.setting, fault.message)]) from None


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
        runtime = RuntimeDirectory(control_socket_path(config.supervisor.control_socket, os.environ, os.getuid()))
        fd_store = FdStore(notifier)
        pair = _read_tls(config)
        where = http_listeners.Where.of(config)
        listeners, activated = http_listeners.opened(where, os.environ, os.getpid(), fd_store)
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
            tls=pair,
        )
        return asyncio.run(_until_the_end(Supervisor(context, settings, notifier)))
    except LightllmdError as refusal:
        for line in refusal.message.splitlines():
            log.own("error", line)
        return refusal.exit_code or EXIT_FAILED
    finally:
        notifier.close()
        for sock in context.listeners if context else listeners:
            # What systemd keeps is reached by the next daemon's clients, and what it made is its own.
            if not (context and (context.activated or context.fd_store.holds(sock))):
                http_listeners.close([sock])
            sock.close()
        if runtime is not None:
            runtime.close()
        sink.close()
