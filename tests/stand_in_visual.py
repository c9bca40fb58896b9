"""The visual worker as an engine knows it: a socket that answers what is wanted when it is told to."""

from __future__ import annotations

import fcntl
import os
import select
import socket

from lightllmd.ipc import images

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def sealed(values: bytes, seals: int = SEALS) -> int:
    """A memfd of them."""
    descriptor = os.memfd_create("lightllmd-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, values)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


class VisualStandIn:
    """`known`: what it has of each key, ``(shape, values)``, or why it can't be encoded. What it does not know is
    answered at once; with `silent` nothing is."""

    def __init__(self, path: str, data_type: str = "float32") -> None:
        self.path, self._data_type = path, data_type
        self.known: dict[bytes, tuple[tuple[int, int, int], bytes] | str] = {}
        self.seals = SEALS
        self.silent = False
        self.wanted: list[bytes] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(8)
        self._links: dict[int, images.ImageStream[images.ToVisual]] = {}
        self._poll = select.poll()
        self._poll.register(self._listener, select.POLLIN)

    def die(self) -> None:
        """All connections end, and nothing listens any more."""
        for link in self._links.values():
            link.close()
        self._listener.close()
        os.unlink(self.path)

    def serve(self) -> None:
        """Answers what has come."""
        while events := self._poll.poll(0):
            for fd, _ in events:
                if fd == self._listener.fileno():
                    link = images.of_client(self._listener.accept()[0])
                    self._links[link.fileno()] = link
                    self._poll.register(link.fileno(), select.POLLIN)
                    continue
                link = self._links[fd]
                for message, _ in link.receive():
                    assert isinstance(message, images.Want)
                    self.wanted.append(message.key)
                    self._answer(link, message.key)
                if link.closed:
                    self._poll.unregister(fd)
                    self._links.pop(fd).close()

    def _answer(self, link: images.ImageStream[images.ToVisual], key: bytes) -> None:
        if self.silent:
            return
        known = self.known.get(key)
        if known is None or isinstance(known, str):
            link.send(images.Unknown(key, known or ""))
            return
        shape, values = known
        descriptor = sealed(values, self.seals)
        link.send(images.Wanted(key, shape, self._data_type), [descriptor])
        os.close(descriptor)
