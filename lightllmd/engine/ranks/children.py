"""The other ranks of a group whose rank 0 is this process: its own children, for the engine without the daemon."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lightllmd.config.plan import Plan, encode_plan
from lightllmd.engine.ranks.leading import LeadingRunner, lead
from lightllmd.engine.ranks.member import Member
from lightllmd.engine.step import Runner
from lightllmd.errors import (
    EXIT_RANK_GONE,
    EngineError,
    LightllmdError,
    NoUsableDevice,
    OutOfMemory,
    RankGone,
    WeightsInvalid,
)
from lightllmd.ipc import channel, flight_record, messages

_ENDING = 10.0  # seconds that a rank may take to end after rank 0's farewell
_TOLD = 4096  # bytes of a rank's last output that an error tells
_ERRORS: dict[str, type[LightllmdError]] = {
    "memory": OutOfMemory,
    "weights": WeightsInvalid,
    "device": NoUsableDevice,
}


class ChildRanks:
    """They end with this process, however it ends, and `close` ends them. A thread that stays is their parent, as far
    as the kernel is concerned: the caller's may end before."""

    def __init__(self, plan: Plan) -> None:
        """Raises EngineError."""
        self._plan = plan
        self._folder = Path(tempfile.mkdtemp(prefix="lightllmd-"))
        self._endpoint = f"ipc://{self._folder}/engine"
        self._parent = ThreadPoolExecutor(1, "ranks")
        self._links: list[channel.Channel[messages.Up]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(1, plan.ranks):
                self._parent.submit(self._spawn, rank).result()
        except OSError as refused:
            self.close()
            raise EngineError(f"rank {rank} can't be started: {refused}") from refused

    def _spawn(self, rank: int) -> None:
        link, theirs = channel.pair()
        flight = flight_record.create()
        try:
            with self._output(rank).open("wb") as output:
                process = subprocess.Popen(
                    [
                        *(sys.executable, "-m", "lightllmd.engine"),
                        *(str(number) for number in (theirs.fileno(), os.getpid(), flight)),
                    ],
                    pass_fds=[theirs.fileno(), flight],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
        finally:
            theirs.close()
            os.close(flight)
        self._links.append(link)
        self._processes.append(process)
        link.send(self._configure(rank))

    def _configure(self, rank: int) -> messages.EngineConfigure:
        return messages.EngineConfigure(
            plan=encode_plan(self._plan),
            generation=1,
            rank=rank,
            endpoint=self._endpoint,
            metrics_dir="",
            metrics_id="",
            ranks=self._plan.ranks,
            device=self._plan.device_of(0, rank),
        )

    def _output(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}"

    def lead(self, runner_of: Callable[[Member], Runner]) -> LeadingRunner:
        """The group's runner, when all ranks have come. Raises what ended one of them instead."""
        return lead(self._plan, self._configure(0), runner_of, lambda rank, farewell: None, self.check)

    def check(self) -> None:
        """Raises what ended a rank, once one has ended."""
        for rank, (link, process) in enumerate(zip(self._links, self._processes, strict=True), 1):
            if process.poll() is not None:
                raise self._failure(rank, link, process)

    def failure(self, gone: RankGone) -> LightllmdError:
        """What stands behind it."""
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_ENDING)  # the others follow the first one
        ended = list(enumerate(zip(self._links, self._processes, strict=True), 1))
        said = [self._failure(rank, *ends) for rank, ends in ended if ends[1].returncode is not None]
        # One that ended because another did is not what it is about.
        return next((one for one in said if not isinstance(one, RankGone)), gone)

    def _failure(
        self, rank: int, link: channel.Channel[messages.Up], process: subprocess.Popen[bytes]
    ) -> LightllmdError:
        for message in link.receive():
            if isinstance(message, messages.Failed) and message.kind != "rank":
                return _ERRORS.get(message.kind, EngineError)(f"rank {rank}: {message.message}")
        code = process.returncode
        if code == EXIT_RANK_GONE:
            return RankGone(f"rank {rank} has ended, since another one did")
        how = f"exit {code}" if code >= 0 else f"signal {-code}"
        told = self._output(rank).read_bytes()[-_TOLD:].decode(errors="replace").strip()
        return EngineError(f"rank {rank} has ended by {how}{': ' + told if told else ''}")

    def close(self) -> None:
        """Waits until they have ended, which each does when its link does; after some seconds they are killed."""
        for link in self._links:
            link.close()
        for process in self._processes:
            try:
                process.wait(_ENDING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._parent.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
