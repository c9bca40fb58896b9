"""Unknown fields of a body that were passed over: a response header names them, and the log once for each client."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from lightllmd.api.web.tenants import KEY
from lightllmd.config.keys import ApiKey

log = logging.getLogger(__name__)

HEADER = "x-lightllmd-ignored"
_MOST_NAMES = 16  # in one header or line
_LONGEST_NAME = 64  # characters
_MOST_LOGGED = 4096  # (client, field) pairs that are remembered; then all are logged again
_SCOPE_KEY = "lightllmd.ignored_fields"
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")


def listed(names: Collection[str]) -> str:
    """As a header may carry them: few, short, and of harmless characters."""
    shown = [_UNSAFE.sub("?", name) for name in _first(names)]
    more = len(names) - len(shown)
    return ", ".join([*shown, f"and {more} more"] if more else shown)


class IgnoredFields:
    """What one api worker has logged of them."""

    def __init__(self) -> None:
        self._logged: set[tuple[str, str]] = set()  # client, field

    def note(self, scope: Scope, names: Collection[str]) -> None:
        """For the answer to the request of `scope`."""
        scope[_SCOPE_KEY] = listed(names)
        client = _client(scope)
        new = {(client, name) for name in _first(names)} - self._logged
        if not new:
            return
        if len(self._logged) + len(new) > _MOST_LOGGED:
            self._logged.clear()
        self._logged |= new
        shown = listed({name for _, name in new})
        log.info("client %s: fields of %s that are not known here are ignored: %s", client, scope["path"], shown)


def name_in(response: Response, scope: Scope) -> Response:
    """`response` with the header, where there is something to name."""
    if (names := scope.get(_SCOPE_KEY)) is not None:
        response.headers[HEADER] = names
    return response


class NamingRoute(APIRoute):
    """A route whose answers have the header."""

    def get_route_handler(self):  # type: ignore[no-untyped-def]
        """FastAPI's."""
        handle = super().get_route_handler()

        async def handle_and_name(request: Request) -> Response:
            return name_in(await handle(request), request.scope)

        return handle_and_name


def _first(names: Collection[str]) -> list[str]:
    return [name[:_LONGEST_NAME] for name in sorted(names)[:_MOST_NAMES]]


def _client(scope: Scope) -> str:
    """Its address, and the name of its key where it has one."""
    address = (scope.get("client") or ("unknown",))[0]
    key: ApiKey | None = scope.get(KEY)
    return f"{address} (key {key.name})" if key is not None and key.name else str(address)
