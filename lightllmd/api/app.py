"""The ASGI application: routes, errors, and the middleware around them; plain ASGI, as every token passes it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from lightllmd import __version__
from lightllmd.api.dialects import native, openai, probes, tokenizing
from lightllmd.api.dialects.native_bodies import GenerateBody, GenerateOrStreamBody, TokensBody
from lightllmd.api.dialects.openai_bodies import ChatBody, CompletionBody
from lightllmd.api.dialects.tokenizing import DetokenizeBody, TokenizeBody
from lightllmd.api.inflight.revisions import Revisions
from lightllmd.api.web.auth import AcceptedKeys, BearerKeys
from lightllmd.api.web.bodies import Body, schemas
from lightllmd.api.web.errors import MethodNotAllowed, error_response
from lightllmd.api.web.ignored_fields import name_in
from lightllmd.errors import InvalidRequest, LightllmdError, NotFound, RequestFailed

_BODIES: list[type[Body]] = [
    GenerateBody,
    GenerateOrStreamBody,
    TokensBody,
    CompletionBody,
    ChatBody,
    TokenizeBody,
    DetokenizeBody,
]


def build_app(revisions: Revisions, *, metrics_dir: str, keys: AcceptedKeys) -> FastAPI:
    """CORS is as the first revision says; to change it takes a new process."""
    http = revisions.front.http
    app = FastAPI(title="lightllmd", version=__version__, redoc_url=None)
    app.include_router(native.router(revisions))
    app.include_router(openai.router(revisions))
    app.include_router(tokenizing.router(revisions))
    app.include_router(probes.router(revisions, metrics_dir))
    _document(app)
    app.add_exception_handler(LightllmdError, _known)
    app.add_exception_handler(HTTPException, _by_framework)
    app.add_exception_handler(Exception, _unexpected)
    app.add_middleware(BearerKeys, keys=keys)
    if http.cors_origins:
        # Outermost: a browser's preflight request carries no key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=http.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return app


def _document(app: FastAPI) -> None:
    """Routes read their bodies themselves, so OpenAPI is told of the models here."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            components = generate().setdefault("components", {}).setdefault("schemas", {})
            components |= schemas(_BODIES)
        return generate()

    app.openapi = openapi  # type: ignore[method-assign]


async def _known(request: Request, error: Exception) -> Response:
    assert isinstance(error, LightllmdError)
    return name_in(error_response(error, request.url.path), request.scope)


async def _by_framework(request: Request, error: Exception) -> Response:
    """A route or method that does not exist."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    if error.status_code == 404:
        return error_response(NotFound(f"there is no {path}; see /docs"), path)
    if error.status_code == 405:
        response = error_response(MethodNotAllowed(f"{path} does not take {method}; see /docs"), path)
        response.headers.update(error.headers or {})
        return response
    return error_response(InvalidRequest(str(error.detail)), path)


async def _unexpected(request: Request, error: Exception) -> Response:
    """The traceback goes to the log."""
    return error_response(RequestFailed("internal error of the HTTP front end"), request.url.path)
