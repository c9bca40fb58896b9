"""The folder of quantised models that are kept from one start to the next: which file is whose, and how much there is.

Several processes may use one folder. A file that is being written has the suffix ``.part`` and a lock of its writer's;
whole ones come by renaming, are never changed, and may be removed while others read them.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import queue
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import torch

from lightllmd.architecture.weight_schemes import WeightSchemes
from lightllmd.architecture.weights import WeightSpec
from lightllmd.config.amount import size
from lightllmd.config.stamps import Stamp
from lightllmd.kernels import quantised
from lightllmd.weights.kept_file import FORMAT, TYPES, Contents, KeptFileWriter, packed, read_kept
from lightllmd.weights.loaded import LoadedWeight, Progress

PART, WHOLE = ".part", ".safetensors"
AHEAD = 2  # weights in host memory that wait for the disk
TELL = 0.05  # seconds between two signs of progress while loading waits for it
PATIENCE = 20.0  # seconds that it waits for one weight; then none is kept
THREAD = "keep"  # the name of one that writes

log = logging.getLogger(__name__)


class KeptModel:
    """The file of one model under one plan, there or not. All that fails beside a load costs no more than a warning."""

    def __init__(
        self,
        folder: Path,
        name: str,
        stamps: Sequence[Stamp],
        weights: Sequence[WeightSpec],
        schemes: WeightSchemes,
        dtype: torch.dtype,
        ranks: int = 1,
    ) -> None:
        """`stamps`: of the files that the weights come from. `name`: for people. `ranks`: each of so many has a file
        with its part of the weights."""
        made_of = [FORMAT, quantised.VERSION, TYPES[dtype], [stamp.content for stamp in stamps]]
        listed = [*made_of, [(weight, schemes.of(weight)) for weight in weights]]
        key = hashlib.sha256(msgspec.msgpack.encode(listed)).hexdigest()
        self.contents = Contents(key, weights, schemes, dtype)
        self._folder, self._ranks = folder, ranks
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:64] or "model"
        self.path = folder / f"{readable}-{key[:32]}{WHOLE}"

    def read(self, device: torch.device, progress: Progress) -> Iterator[LoadedWeight]:
        """Its weights. Raises KeptDamaged."""
        yield from read_kept(self.path, self.contents, device, progress)
        try:
            os.utime(self.path)  # what was used the longest ago makes room
        except OSError:
            log.debug("%s was removed while it was read", self.path)

    def discard(self) -> None:
        """A damaged one."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as refused:
            log.warning("%s can't be removed: %s", self.path, refused)

    def keep(self, weights: Iterable[LoadedWeight], beat: Callable[[], None]) -> Iterator[LoadedWeight]:
        """Passes them on, and writes them beside that; `beat` is called while the disk is waited for. Of a load that
        does not come to its end nothing stays."""
        try:
            writer = _open(self.path, self.contents, self._ranks)
        except OSError as refused:
            log.warning("the quantised weights are not kept in %s: %s", self._folder, refused)
            writer = None
        if writer is None:
            yield from weights
            return
        whole = False
        try:
            for loaded in weights:
                writer.put(packed(loaded), beat)
                yield loaded
                del loaded  # nothing is kept while the next is read
            whole = True
        finally:
            writer.put(whole, beat)


class _BackgroundWriter:
    """Writes in a thread that keeps no process alive: what a dead one leaves is removed by the next."""

    def __init__(self, descriptor: int, part: Path, path: Path, contents: Contents) -> None:
        self._descriptor, self._part, self._path, self._contents = descriptor, part, path, contents
        self._waiting: queue.Queue[LoadedWeight | bool] = queue.Queue(AHEAD)
        self._failed = threading.Event()
        threading.Thread(target=self._run, name=THREAD, daemon=True).start()

    def put(self, one: LoadedWeight | bool, beat: Callable[[], None]) -> None:
        """The next weight; at the end whether they are all. Waits while `AHEAD` others wait, for a time."""
        begun = time.monotonic()
        while not self._failed.is_set():
            try:
                self._waiting.put(one, timeout=TELL)
                return
            except queue.Full:
                beat()
            if time.monotonic() - begun > PATIENCE:
                log.warning("the quantised weights are not kept in %s: its disk is too slow", self._path.parent)
                self._failed.set()

    def _run(self) -> None:
        try:
            writer = KeptFileWriter(self._descriptor, self._contents)
            while not isinstance(one := self._waiting.get(), bool):
                writer.write(one)
                if self._failed.is_set():
                    return
            if not one:
                return
            writer.finish()
            os.replace(self._part, self._path)
            log.info("the quantised weights are kept in %s (%s)", self._path, size(self._contents.nbytes))
        except OSError as refused:
            log.warning("the quantised weights are not kept in %s: %s", self._path.parent, refused)
        finally:
            self._failed.set()  # or it is done
            self._part.unlink(missing_ok=True)  # no more there where it became the whole file
            os.close(self._descriptor)  # and its lock with it


def _open(path: Path, contents: Contents, ranks: int) -> _BackgroundWriter | None:
    """None where another process writes the same, or there is too little room. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_suffix(PART)
    descriptor = _locked(part, create=True)
    if descriptor is None:
        log.info("another process keeps the same quantised weights")
        return None
    try:
        _make_room(path.parent, contents.nbytes, ranks)
        os.ftruncate(descriptor, 0)
        return _BackgroundWriter(descriptor, part, path, contents)
    except OSError:
        part.unlink(missing_ok=True)
        os.close(descriptor)
        raise


def _locked(part: Path, create: bool) -> int | None:
    """Its descriptor, where no other process has it locked."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    descriptor = os.open(part, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(part)):  # else it was renamed or removed meanwhile
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None


def _make_room(folder: Path, needed: int, ranks: int) -> None:
    """Kept files may take half of what would be free without them; those that were used the longest ago go. Raises
    OSError where that does not suffice for the files of all ranks."""
    for part in folder.glob(f"*{PART}"):
        _remove_left(part)
    kept = sorted(_kept_in(folder))
    taken = sum(nbytes for _, nbytes, _ in kept)
    most = (shutil.disk_usage(folder).free + taken) // 2
    if needed * ranks > most:
        raise OSError(f"they take {size(needed * ranks)}, of its disk {size(most)} may be used")
    for _, nbytes, found in kept:
        if taken + needed <= most:
            return
        found.unlink(missing_ok=True)
        taken -= nbytes


def _kept_in(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """When each whole one was used last, its bytes, and where it is."""
    for found in folder.glob(f"*{WHOLE}"):
        try:
            facts = found.lstat()
        except FileNotFoundError:  # another process made room
            continue
        if not stat.S_ISDIR(facts.st_mode):
            yield facts.st_mtime, facts.st_size, found


def _remove_left(part: Path) -> None:
    """What a dead process left."""
    try:
        descriptor = _locked(part, create=False)
    except FileNotFoundError:
        return
    if descriptor is not None:
        part.unlink(missing_ok=True)
        os.close(descriptor)
