"""Weight files on their way into the page cache before anybody needs them. No torch.

``python -m lightllmd.weights.read_ahead FILE…`` does it in a process of its own, which may be ended at any time.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence

from lightllmd.config.files import open_regular
from lightllmd.weights.device_facts import free_memory

THREADS = 4  # a fast disk answers several at a time better than one
PIECE = 64 << 20  # bytes that a thread asks for at a time, without Python's lock
MARGIN = 0.1  # of the free memory that isn't filled: what is read must not drive out what was read before

log = logging.getLogger(__name__)


class ReadAhead:
    """Begins at once, in threads that keep no process alive. What is in the cache already costs next to nothing.

    Nothing depends on it: a file that can't be read is left to the loader.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self._pieces = _pieces(files)
        self._turn = threading.Lock()  # held by the thread that takes the next piece
        self._threads = [threading.Thread(target=self._read, name="read-ahead", daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Until all of it has been read, or could not be."""
        for thread in self._threads:
            thread.join()

    def _read(self) -> None:
        try:
            with open(os.devnull, "wb", buffering=0) as nowhere:
                while piece := self._next():
                    file, begin, size = piece
                    with open(open_regular(file), "rb", buffering=0) as stored:
                        # To /dev/null pages are passed, not copied. posix_fadvise(WILLNEED) is no way: whatever it is
                        # asked for, it fetches no more than the device's largest transfer.
                        while size > 0 and (count := os.sendfile(nowhere.fileno(), stored.fileno(), begin, size)):
                            begin, size = begin + count, size - count
        except OSError as refused:
            log.debug("nothing is read ahead: %s", refused)

    def _next(self) -> tuple[str, int, int] | None:
        with self._turn:
            return next(self._pieces, None)


def _pieces(files: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(file, first byte, bytes), as many as memory holds."""
    room = int(free_memory() * (1 - MARGIN))
    for file in files:
        size = os.stat(file).st_size
        for begin in range(0, size, PIECE):
            count = min(PIECE, size - begin, room)
            if count <= 0:
                return
            room -= count
            yield file, begin, count


def main() -> int:
    """Reads the files that the arguments name. Returns the exit status."""
    ReadAhead(sys.argv[1:]).wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
