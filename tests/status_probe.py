"""Asks a daemon's /v1/status all the time, in a process of its own so that no client's work is in the figures.

``python status_probe.py SOCKET``: one connection, one question each 20 ms until stdin closes; then prints one JSON
object: ``{"latencies": [seconds, …], "failure": null or text}``.
"""

from __future__ import annotations

import http.client
import json
import select
import socket
import sys
import time


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("control", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def main(path: str) -> None:
    latencies, failure = [], None
    connection = _Connection(path)
    while not select.select([sys.stdin], [], [], 0.02)[0]:
        begun = time.perf_counter()
        try:
            connection.request("GET", "/v1/status")
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException) as error:
            failure = repr(error)
            break
        latencies.append(time.perf_counter() - begun)
        if answer.status != 200:
            failure = f"{answer.status}: {body!r}"
            break
    print(json.dumps({"latencies": latencies, "failure": failure}))


if __name__ == "__main__":
    main(sys.argv[1])
