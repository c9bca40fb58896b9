"""Connections of the control socket: who is at the other end, and the bounds on them."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lightllmd.supervisor.runtime import group_id

MOST_CONNECTIONS = 64
FIRST_BYTE_TIMEOUT = 30.0  # seconds
BODY_TIMEOUT = 30.0
SO_PEERGROUPS = 59  # Linux; not in Python's socket module
_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n"
    b'{"error":"TryAgain","message":"more than 64 control connections"}'
)


@dataclass(frozen=True)
class Peer:
    """As the kernel knows it since the moment it connected."""

    pid: int
    uid: int
    groups: frozenset[int]


def peer_of(sock: Any) -> Peer:
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


class ControlProtocol(HttpToolsProtocol):
    """uvicorn's, and: the peer goes into `request.state.peer`; the bounds on connections are kept."""

    _first_byte: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.write(_TOO_MANY)
            transport.close()
            return
        self.app_state = {**self.app_state, "peer": peer_of(transport.get_extra_info("socket"))}
        self._first_byte = self.loop.call_later(FIRST_BYTE_TIMEOUT, transport.close)

    def data_received(self, data: bytes) -> None:
        if self._first_byte is not None:
            self._first_byte.cancel()
            self._first_byte = None
        if not self.transport.is_closing():
            super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._first_byte is not None:
            self._first_byte.cancel()
        super().connection_lost(exc)
