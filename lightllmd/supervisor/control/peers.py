"""Connections of the control socket: who is at the other end, and the bounds on them."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

from lightllmd.http.bounds import Bounds, descriptors_left
from lightllmd.http.connection import Connection
from lightllmd.supervisor.host.runtime_directory import group_id

MOST_CONNECTIONS = 64
SO_PEERGROUPS = 59  # Linux; not in Python's socket module


@dataclass(frozen=True)
class Peer:
    """As the kernel knows it since the moment it connected."""

    pid: int
    uid: int
    groups: frozenset[int]


def peer_of(sock: Any) -> Peer:
    """Of a connected Unix socket (SO_PEERCRED and SO_PEERGROUPS, unix(7))."""
    pid, uid, gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        groups = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)
    except OSError:
        groups = b""  # in more than 256 groups, or a kernel before 4.13: the primary one still counts
    return Peer(pid, uid, frozenset({gid, *struct.unpack(f"{len(groups) // 4}I", groups)}))


def may_mutate(peer: Peer, *, own_uid: int | None = None, group: int | None = None) -> bool:
    """root, the daemon's own user, and members of group lightllmd."""
    own_uid = os.getuid() if own_uid is None else own_uid
    group = group_id() if group is None else group
    return peer.uid in (0, own_uid) or (group is not None and group in peer.groups)


class ControlConnection(Connection):
    """The peer goes into `request.state.peer`."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio's; asks the kernel who connected."""
        super().connection_made(transport)
        self.state["peer"] = peer_of(transport.get_extra_info("socket"))


def bounds() -> Bounds:
    """Of the control socket: a body of 1 MiB and few connections, which all are on this host."""
    return Bounds(
        header_timeout=10.0,
        body_timeout=10.0,
        write_timeout=30.0,
        keep_alive_timeout=75.0,
        min_rate=1024,
        connections=descriptors_left(MOST_CONNECTIONS),
        body_bytes=4 << 20,
    )
