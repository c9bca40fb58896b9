"""What a client may send, how long it may take, and how many there may be."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass

# Bytes, and a number of fields, before a body. nginx and Node take about as much.
MAX_URL = 8 << 10
MAX_LINE = 16 << 10  # one header field, name and value
MAX_HEAD = 32 << 10  # request line and header fields
MAX_FIELDS = 128
MAX_FRAMING = 16 << 10  # chunk extensions and trailers of one body, beyond CHUNK_FRAMING for each chunk
CHUNK_FRAMING = 20  # bytes: sixteen digits and two line ends
HIGH_WATER = 64 << 10  # bytes of a body that wait for the application until reading pauses

# Descriptors that connections leave free.
_GUESTS = 8  # above the cap, for health and control alone
_ACCEPTS = 8  # in one turn of the loop
_FILES = 24  # the engines' sockets, a tokenizer's files
_FEWEST = 8  # connections, however few descriptors there are
_MOST = 16384  # connections, where the descriptors don't say


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Of one server. Times in seconds, sizes in bytes."""

    header_timeout: float  # from the connection, or a request's first byte, to the end of its header
    body_timeout: float  # from there to the end of the body, and 1 / min_rate for each byte that came
    write_timeout: float  # an answer that the client took less of than min_rate for this long is broken off
    keep_alive_timeout: float  # an idle connection is closed after this
    min_rate: float  # bytes per second
    connections: int
    body_bytes: int  # of all bodies that are not yet read and decoded
    guests: int = _GUESTS  # connections beyond, which get what is reserved


def descriptors_left(wanted: int = _MOST) -> int:
    """How many connections this process may hold: `wanted`, or what its descriptors leave."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    taken = len(os.listdir("/proc/self/fd")) + _GUESTS + _ACCEPTS + _FILES
    return min(wanted, max(_FEWEST, soft - taken))


def raise_descriptor_limit() -> None:
    """As far as the hard limit allows: the soft one is low for programs that use select(2), which none of ours does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 4 * _MOST if hard == resource.RLIM_INFINITY else min(hard, 4 * _MOST)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
