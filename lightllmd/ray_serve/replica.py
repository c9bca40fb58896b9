"""One replica: a daemon, and the proxy that hands requests on to it. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from lightllmd.errors import EngineError
from lightllmd.ray_serve.daemon import ReplicaDaemon

_FORWARDED_FOR = "x-forwarded-for"
# Of one connection, not of the message (RFC 9110, 7.6.1); the lengths are said anew.
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding"}
    | {"upgrade", "host", "content-length"}
)


def _passed_on(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in _HOP_BY_HOP]


class Replica:
    """Await `start` before the first request. `on_lost` is called with the daemon's exit code when it ends unasked."""

    def __init__(self, file: str | None, settings: Mapping[str, Any], on_lost: Callable[[int], None]) -> None:
        self.daemon = ReplicaDaemon(file, settings)
        self._on_lost = on_lost
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when the engine is ready. Raises EngineError."""
        self.daemon.start()
        await self.daemon.ready()
        self._watch = asyncio.create_task(self._until_it_ends())

    async def _until_it_ends(self) -> None:
        while (code := self.daemon.ended()) is None:
            await asyncio.sleep(0.1)
        self._on_lost(code)

    async def __call__(self, request: Request) -> Response:
        """The daemon's answer, as it comes. A stream whose daemon dies breaks off: it is never ended as if complete."""
        headers = _passed_on(request.headers.items())
        if request.client is not None:
            before = [value for name, value in headers if name == _FORWARDED_FOR]
            headers = [(name, value) for name, value in headers if name != _FORWARDED_FOR]
            headers.append((_FORWARDED_FOR, ", ".join([*before, request.client.host])))
        path = request.url.path.removeprefix(request.scope.get("root_path", "").rstrip("/"))
        url = httpx.URL(path or "/", query=request.url.query.encode())
        body = await request.body()
        try:
            asked = self.daemon.client.build_request(request.method, url, headers=headers, content=body)
            answer = await self.daemon.client.send(asked, stream=True)
        except httpx.TransportError as lost:
            error = {
                "message": f"the daemon of this replica is gone: {lost or type(lost).__name__}",
                "type": "service_unavailable",
            }
            return JSONResponse({"error": error}, 503, {"Retry-After": "1"})
        response = StreamingResponse(_body_of(answer), answer.status_code)
        kept = _passed_on(answer.headers.multi_items())
        response.raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in kept]
        return response

    async def check_health(self) -> None:
        """Raises EngineError where a new replica would help: the daemon doesn't answer. An engine that restarts is no
        reason: its streams wait for it here, and the end of the replica would be theirs."""
        if not await self.daemon.alive():
            raise EngineError("the supervisor of this replica's daemon does not answer")

    def stop(self) -> None:
        """Drains and ends the daemon."""
        if self._watch is not None:
            self._watch.cancel()
        self.daemon.stop()


async def _body_of(answer: httpx.Response) -> AsyncIterator[bytes]:
    """Compressed or not, as the daemon sent it. Where the client goes, the daemon's connection does: it aborts."""
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()
