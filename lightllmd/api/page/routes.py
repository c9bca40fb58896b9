"""The routes of the page. All of it but its state is open to every client: it tells no more than /health does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2
import msgspec
from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from lightllmd.api.inflight.revisions import Revisions
from lightllmd.api.page.files import HEADERS, PageFiles
from lightllmd.api.page.view import View, health_of, view_of
from lightllmd.api.web.responses import on_each
from lightllmd.errors import NotFound

STATE_PATH = "/page/state"  # the only one that takes an API key, where one is required
_FOLDER = "/page/"
_json = msgspec.json.Encoder()


def _asks_for_html(scope: Scope) -> bool:
    return any(name == b"accept" and b"text/html" in value for name, value in scope["headers"])


class HtmlRoute(APIRoute):
    """For clients that ask for HTML; others' requests for the same path are another API's."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Starlette's."""
        return super().matches(scope) if _asks_for_html(scope) else (Match.NONE, {})


class Page:
    """`shared`: another API has an answer of its own to GET /."""

    def __init__(self, revisions: Revisions, key_required: Callable[[], bool], *, shared: bool) -> None:
        self._revisions = revisions
        self._key_required = key_required
        self._shared = shared
        self._files = PageFiles()
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
        self._template = environment.from_string(self._files.template)
        self._rendered: tuple[object, bytes] = (None, b"")  # what was shown last, and its HTML

    def is_open(self, scope: Scope) -> bool:
        """Whether a request needs no API key."""
        path = scope["path"]
        if scope["method"] not in ("GET", "HEAD"):
            return False
        if path == "/":
            return not self._shared or _asks_for_html(scope)
        return path.startswith(_FOLDER) and path != STATE_PATH

    def html(self) -> bytes:
        """The document; rendered anew only where it would be another one."""
        locked = self._key_required()
        view = view_of(self._revisions) if not locked else None
        health = health_of(self._revisions)
        shown = (view, health)
        if self._rendered[0] != shown:
            text = self._template.render(view=view, ready=health[0], health=health[1], tag=self._files.tag)
            self._rendered = shown, text.encode()
        return self._rendered[1]

    def state(self) -> View:
        """For scripts."""
        return view_of(self._revisions)

    def router(self) -> APIRouter:
        """To be included before other routes for /."""
        routes = APIRouter(tags=["page"])
        document = APIRouter(route_class=HtmlRoute if self._shared else APIRoute)

        @on_each(
            document, "/", ["GET", "HEAD"], response_class=Response, responses={200: {"content": {"text/html": {}}}}
        )
        async def page() -> Response:
            """The daemon's state and a chat, for browsers."""
            headers = HEADERS | {"Cache-Control": "no-cache", "Vary": "Accept"}
            return Response(self.html(), headers=headers, media_type="text/html")

        @routes.get(STATE_PATH)
        async def state() -> Response:
            """What the page shows, for its scripts."""
            headers = HEADERS | {"Cache-Control": "no-store"}
            return Response(_json.encode(self.state()), headers=headers, media_type="application/json")

        files: dict[int | str, dict[str, Any]] = {
            200: {"content": {"text/css": {}, "text/javascript": {}, "image/svg+xml": {}}}
        }

        @on_each(routes, "/page/{tag}/{name}", ["GET", "HEAD"], response_class=Response, responses=files)
        async def file(tag: str, name: str, request: Request) -> Response:
            """Styles and scripts of the page."""
            answer = self._files.answer(tag, name, request.headers.get("if-none-match", ""))
            if answer is None:
                raise NotFound(f"there is no {request.url.path}; see /docs")
            return answer

        routes.include_router(document)
        return routes
