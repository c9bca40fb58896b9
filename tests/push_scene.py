"""The loop that pushes, in a thread of the test; the test is the supervisor at the other end of its channel."""

from __future__ import annotations

import asyncio
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import msgspec
from prometheus_client.mmap_dict import MmapedDict, mmap_key

from gateway_stand_in import TIMEOUT
from lightllmd.ipc import channel, messages
from lightllmd.ipc.messages import Heartbeat, PushConfigure, PushTarget
from lightllmd.push.worker import PushWorker

GROUP = {"instance": "node7"}


def target(gateway: str, **fields: Any) -> PushTarget:
    known: dict[str, Any] = {"job": "lightllm", "grouping_key": GROUP, "interval": 0.01}
    return PushTarget(gateway=gateway, **(known | fields))


def count_something(directory: Path, value: float, name: str = "test") -> None:
    """As a process that counts in multiprocess mode."""
    written = MmapedDict(str(directory / f"counter_{name}.db"))
    written.write_value(mmap_key(f"lightllm_{name}", f"lightllm_{name}_total", [], [], "Of a test"), value, 0.0)
    written.close()


class PushScene:
    """A context manager."""

    def __init__(self, directory: Path, gateway: str, push_timeout: float = 10.0, **fields: Any) -> None:
        self.directory = directory
        self.supervisor, theirs = channel.pair()
        link = channel.inherited(theirs.detach())
        self.target = target(gateway, **fields)
        configure = PushConfigure(self.target, str(directory), "push-0", "debug")
        self._worker = PushWorker(link, configure, push_timeout)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._worker.run()))
        self._link = link
        self.last: Heartbeat | None = None

    def tell(self, message: Any) -> None:
        self.supervisor.send(message)

    def change(self, **fields: Any) -> None:
        self.target = msgspec.structs.replace(self.target, **fields)
        self.tell(self.target)

    def beat(self, reached: Callable[[dict[str, float]], object] = lambda _: True) -> dict[str, float]:
        """The stats of the next heartbeat that satisfies `reached`."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            select.select([self.supervisor], [], [], 1.0)
            for message in self.supervisor.receive():
                assert isinstance(message, Heartbeat)
                self.last = message
                if reached(message.stats):
                    return message.stats
        raise AssertionError(f"no such heartbeat; the last was {self.last}")

    def stop(self) -> float:
        """Seconds that it took."""
        begun = time.monotonic()
        self.tell(messages.Stop())
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        return time.monotonic() - begun

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self.stop()
        self._link.close()
        self.supervisor.close()
