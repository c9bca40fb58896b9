"""Bytes of weight files, read and never mapped: a file that is cut off meanwhile gives an error, where touching its
mapping would end the process (SIGBUS)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

from lightllmd.config.files import open_regular
from lightllmd.errors import WeightsInvalid

if TYPE_CHECKING:  # who looks at headers alone does without
    import numpy as np


class WeightFile:
    """One file, open for as long as the context lasts, or until it is closed. Any thread may read. Raises
    WeightsInvalid."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._descriptor = open_regular(path)
        except OSError as error:
            raise self._unreadable(error) from None

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def close(self) -> None:
        """Once, when no thread reads."""
        os.close(self._descriptor)

    def read(self, offset: int, into: np.ndarray | bytearray) -> None:
        """Fills `into` (bytes) from `offset` on. The kernel is told beforehand which they are."""
        wanted, at = memoryview(cast("bytearray", into)), 0
        try:
            os.posix_fadvise(self._descriptor, offset, len(wanted), os.POSIX_FADV_WILLNEED)
            while at < len(wanted):
                count = os.preadv(self._descriptor, [wanted[at:]], offset + at)
                if not count:
                    raise WeightsInvalid(f"{self._path}: truncated while it was read: it has no byte {offset + at}")
                at += count
        except OSError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: OSError) -> WeightsInvalid:
        return WeightsInvalid(f"{self._path}: can't be read: {error.strerror}")
