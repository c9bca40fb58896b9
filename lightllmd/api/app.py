"""The ASGI application: routes, errors, and the middleware around them; plain ASGI, as every token passes it."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from lightllmd import __version__
from lightllmd.api.dialects import embeddings, probes, tokenizing
from lightllmd.api.dialects.anthropic import routes as anthropic
from lightllmd.api.dialects.dialect import Dialect
from lightllmd.api.dialects.native import routes as native
from lightllmd.api.dialects.native import scores as native_scores
from lightllmd.api.dialects.openai import routes as openai
from lightllmd.api.dialects.responses.routes import dialect as responses_dialect
from lightllmd.api.dialects.scoring import routes as scoring
from lightllmd.api.dialects.tgi import routes as tgi
from lightllmd.api.documentation.served import Documentation
from lightllmd.api.inflight.revisions import Revisions
from lightllmd.api.page.routes import Page
from lightllmd.api.web.auth import AcceptedKeys, KeyedAccess
from lightllmd.api.web.errors import ErrorAnswers, InternalError, MethodNotAllowed
from lightllmd.api.web.ignored_fields import name_in
from lightllmd.api.web.limits import HEADERS as RATE_HEADERS
from lightllmd.api.web.limits import KeyLimits, Leases
from lightllmd.api.web.refusals import Refusals
from lightllmd.api.web.tenants import Tenants
from lightllmd.config.plan import Plan
from lightllmd.errors import InvalidRequest, LightllmdError, NotFound


def dialects_of(plan: Plan, store_dir: str = "") -> tuple[Dialect, ...]:
    """What this plan's front end speaks. To change that takes a new process. `store_dir`: see ApiConfigure."""
    generating = tgi.DIALECT if plan.config.params.use_tgi_api else native.GENERATING
    return (
        generating,
        native.COUNTING,
        native_scores.DIALECT,
        anthropic.DIALECT,  # before OpenAI's, whose /v1/models it answers for its own clients
        openai.DIALECT,
        responses_dialect(plan.config.http, store_dir),
        embeddings.DIALECT,
        tokenizing.DIALECT,
        scoring.DIALECT,
        scoring.RERANKING,
    )


def error_answers(dialects: Sequence[Dialect]) -> ErrorAnswers:
    """In the dialect of each path."""
    return ErrorAnswers(
        {path: dialect.errors for dialect in dialects for path in dialect.paths},
        {dialect.header: dialect.errors for dialect in dialects if dialect.header},
    )


def build_app(
    revisions: Revisions, *, metrics_dir: str, keys: AcceptedKeys, leases: Leases, dialects: Sequence[Dialect]
) -> FastAPI:
    """CORS is as the first revision says; to change it takes a new process."""
    http = revisions.current.http
    refusals = Refusals(Tenants(http).address, revisions.accounts.refused)
    errors = error_answers(dialects)
    app = FastAPI(title="lightllmd", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    page = None
    if http.page:
        tgi_api = revisions.current.plan.config.params.use_tgi_api
        page = Page(revisions, lambda: keys.required, shared=tgi_api)
        app.include_router(page.router())
    for dialect in dialects:
        app.include_router(dialect.router(revisions))
    app.include_router(probes.router(revisions, metrics_dir))
    app.include_router(Documentation(app, dialects).router())
    _answer_errors(app, errors)
    app.add_middleware(KeyLimits, leases=leases, errors=errors, refusals=refusals)
    is_open = page.is_open if page else lambda scope: False
    app.add_middleware(KeyedAccess, keys=keys, errors=errors, refusals=refusals, is_open=is_open)
    if http.cors_origins:
        # Outermost: a browser's preflight request carries no key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=http.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After", *RATE_HEADERS],
        )
    return app


def _answer_errors(app: FastAPI, errors: ErrorAnswers) -> None:
    @app.exception_handler(LightllmdError)
    async def known(request: Request, error: LightllmdError) -> Response:
        return name_in(errors.response(error, request.scope), request.scope)

    @app.exception_handler(HTTPException)
    async def by_framework(request: Request, error: HTTPException) -> Response:
        """A route or method that does not exist."""
        path, method = request.url.path, request.method
        if error.status_code == 404:
            return errors.response(NotFound(f"there is no {path}; see /docs"), request.scope)
        if error.status_code == 405:
            response = errors.response(MethodNotAllowed(f"{path} does not take {method}; see /docs"), request.scope)
            response.headers.update(error.headers or {})
            return response
        return errors.response(InvalidRequest(str(error.detail)), request.scope)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        """The traceback goes to the log."""
        return errors.response(InternalError("internal error of the HTTP front end"), request.scope)
