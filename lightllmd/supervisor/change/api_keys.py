"""The API keys in force, and their files: one that an operator changes, or `lightllmctl key`, is in force by itself."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from lightllmd.config import keys
from lightllmd.config.keys import KeyRing, KeysInvalid
from lightllmd.config.parameters import Config
from lightllmd.supervisor.change.settings import Settings
from lightllmd.supervisor.change.watched_files import Unusable, WatchedFiles
from lightllmd.supervisor.context import Context


class KeysInForce(WatchedFiles[KeyRing]):
    """Belongs to the single-writer loop. `put` puts a configuration in force that needs no new process."""

    settles = True

    def __init__(self, context: Context, settings: Settings, put: Callable[[Config], None]) -> None:
        super().__init__(context, "keys", "what API keys there are")
        self._settings = settings
        self._put = put
        self._taken: KeyRing | None = None

    @property
    def _files(self) -> tuple[str, ...]:
        return tuple(self._context.config.http.key_files.values())

    @property
    def _in_force(self) -> bool:
        return self._taken is self._context.config.held_keys

    def _read(self, files: tuple[str, ...]) -> KeyRing:
        http = self._context.config.http
        try:
            return keys.read_ring(http.key_files, http.metrics_key)
        except KeysInvalid as fault:
            raise Unusable(fault.message) from None

    def _take(self, content: KeyRing) -> None:
        config = self._context.config
        self.fault = ""
        if content != config.keys:
            config = msgspec.structs.replace(config, held_keys=content)
            self._put(config)
            written = self._settings.written
            if written.http.key_files == config.http.key_files:
                self._settings.take(msgspec.structs.replace(written, held_keys=content))
            number = len({*(content.requests or []), *(content.metrics or [])})
            self._context.events.add("keys", f"the files of API keys changed: {number} keys are in force")
        self._taken = config.held_keys
