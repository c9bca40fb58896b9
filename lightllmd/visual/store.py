"""Which images are kept encoded, and for which requests. Pure: no clock, no process; only embeddings' descriptors."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class StoredEmbedding:
    """`fd`: a sealed memfd of `size` bytes, which this owns."""

    fd: int
    size: int
    shape: tuple[int, int, int]  # [1 + deepstack, tokens, hidden]

    def close(self) -> None:
        """Lets go of the memory; engines that have the descriptor keep it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


@dataclass
class ImageRecord:
    """One image. Waits to be encoded, is being encoded, then has an embedding or says why there is none."""

    key: bytes
    prepared: Any  # until it is encoded
    holders: set[Hashable] = field(default_factory=set)
    encoding: bool = False  # it stays until that is done
    embedding: StoredEmbedding | None = None
    failed: str = ""


class ImageStore:
    """At most `capacity` records. Where room is made, the least recently used ones that no request holds go until
    `reserved` are left, as far as there are such; never one that a request holds, however old it is."""

    def __init__(self, capacity: int, reserved: int) -> None:
        self.capacity, self._reserved = capacity, reserved
        self._records: OrderedDict[bytes, ImageRecord] = OrderedDict()  # least recently used first
        self._held: dict[Hashable, set[bytes]] = {}
        self.hits = self.misses = self.evicted = 0  # images of requests; records

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: object) -> bool:
        return key in self._records

    @property
    def references(self) -> int:
        """Of all requests to their distinct images."""
        return sum(len(keys) for keys in self._held.values())

    @property
    def stored_bytes(self) -> int:
        """Of all embeddings."""
        return sum(one.embedding.size for one in self._records.values() if one.embedding is not None)

    def get(self, key: bytes) -> ImageRecord | None:
        """The record, which counts as used."""
        record = self._records.get(key)
        if record is not None:
            self._records.move_to_end(key)
        return record

    def hold(self, holder: Hashable, images: Sequence[tuple[bytes, Any]]) -> bool:
        """All images of a request, with what was prepared of each; a holder has one such set. False: there is no room
        for all of them, and nothing has changed."""
        assert holder not in self._held
        wanted = dict(images)
        new = [key for key in wanted if key not in self._records]
        if not self._make_room(len(new), wanted):
            return False
        self.misses += len(new)
        self.hits += len(images) - len(new)
        for key, prepared in wanted.items():
            record = self._records.setdefault(key, ImageRecord(key, prepared))
            if record.failed:
                record.failed, record.prepared = "", prepared if prepared is not None else record.prepared
            record.holders.add(holder)
            self._records.move_to_end(key)
        self._held[holder] = set(wanted)
        return True

    def release(self, holder: Hashable) -> None:
        """Of a request that holds nothing: nothing happens. An image that none needs and that is not encoded yet is
        forgotten."""
        for key in self._held.pop(holder, ()):
            record = self._records[key]
            record.holders.discard(holder)
            if not record.holders and not record.encoding and record.embedding is None:
                del self._records[key]

    def waiting(self, most: int) -> list[ImageRecord]:
        """The next ones to be encoded, the oldest first; they are `encoding` from here on until `encoded`."""
        found = [
            one
            for one in self._records.values()
            if one.embedding is None and not one.encoding and not one.failed and one.holders
        ][:most]
        for record in found:
            record.encoding = True
        return found

    @property
    def encoding(self) -> bool:
        """Whether any is being encoded."""
        return any(one.encoding for one in self._records.values())

    @property
    def queued(self) -> int:
        """Records that wait to be encoded, or are being encoded."""
        return sum(one.embedding is None and not one.failed for one in self._records.values())

    def encoded(self, record: ImageRecord, embedding: StoredEmbedding | None, why: str = "") -> None:
        """What became of it; without an embedding `why`."""
        record.encoding, record.embedding, record.failed = False, embedding, why
        if embedding is not None:
            record.prepared = None
        elif not record.holders:
            del self._records[record.key]

    def _make_room(self, needed: int, kept: dict[bytes, Any]) -> bool:
        missing = len(self._records) + needed - self.capacity
        if missing <= 0 or not needed:
            return True
        idle = [key for key, one in self._records.items() if not one.holders and not one.encoding and key not in kept]
        if missing > len(idle):
            return False
        for key in idle[: max(missing, len(self._records) - self._reserved)]:
            self._drop(key)
        return True

    def _drop(self, key: bytes) -> None:
        record = self._records.pop(key)
        self.evicted += 1
        if record.embedding is not None:
            record.embedding.close()

    def close(self) -> None:
        """Lets go of all."""
        self._held.clear()
        for key in list(self._records):
            self._drop(key)
