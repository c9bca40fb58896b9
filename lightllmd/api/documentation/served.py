"""/docs and /openapi.json: made once, when they are first asked for, and from nothing but what this package brings."""

from __future__ import annotations

import asyncio
import hashlib
from base64 import b64encode
from collections.abc import Sequence
from functools import cached_property
from importlib import resources
from threading import Lock
from typing import Any

import jinja2
import msgspec
from fastapi import APIRouter, FastAPI
from starlette.responses import Response

from lightllmd.api.dialects.dialect import Dialect
from lightllmd.api.documentation.errors import error_rows, forms
from lightllmd.api.documentation.openapi import document
from lightllmd.api.documentation.routes import field_rows, routes_of
from lightllmd.api.web.responses import on_each

TEMPLATE, STYLE = "docs.html", "docs.css"


class Documentation:
    """Of one application, whose routes are all there when the first request comes."""

    def __init__(self, app: FastAPI, dialects: Sequence[Dialect]) -> None:
        self._app, self._dialects = app, dialects
        self._making = Lock()

    @cached_property
    def _document(self) -> dict[str, Any]:
        return document(self._app, self._dialects)

    @cached_property
    def _json(self) -> bytes:
        return msgspec.json.encode(self._document)

    @cached_property
    def _style(self) -> str:
        return (resources.files(__package__) / STYLE).read_text()

    @cached_property
    def _html(self) -> bytes:
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        template = environment.from_string((resources.files(__package__) / TEMPLATE).read_text())
        routes = routes_of(self._document["paths"], self._dialects)
        return template.render(
            document=self._document,
            style=self._style,
            errors=error_rows(self._dialects),
            dialects=list(forms(self._dialects)),
            fields=field_rows(routes),
        ).encode()

    @cached_property
    def _headers(self) -> dict[str, str]:
        """The document has no script and loads nothing; its one style sheet is the one that stands in it."""
        digest = b64encode(hashlib.sha256(self._style.encode()).digest()).decode()
        return {
            "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }

    def _made(self, name: str) -> Any:
        with self._making:
            return getattr(self, name)

    def router(self) -> APIRouter:
        """They take some hundred milliseconds to make, so not on the event loop."""
        routes = APIRouter(tags=["daemon"])

        async def made(name: str) -> Any:
            return await asyncio.get_running_loop().run_in_executor(None, self._made, name)

        @on_each(
            routes, "/docs", ["GET", "HEAD"], responses={200: {"content": {"text/html": {}}}}, response_class=Response
        )
        async def docs() -> Response:
            """This API for people: routes, fields, errors. It needs no script and no network."""
            return Response(await made("_html"), headers=self._headers, media_type="text/html")

        @on_each(routes, "/openapi.json", ["GET", "HEAD"])
        async def openapi() -> Response:
            """This API as an OpenAPI document."""
            return Response(await made("_json"), media_type="application/json")

        return routes
