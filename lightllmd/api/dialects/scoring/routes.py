"""vLLM's routes for models that score: /score, /rerank (also as Jina's and Cohere's clients know it), /classify and
/pooling."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lightllmd.api.dialects.dialect import Dialect, Responder, Translation
from lightllmd.api.dialects.openai.choices import error_frame
from lightllmd.api.dialects.scoring.bodies import ClassifyBody, PoolingBody, RerankBody, ScorePairsBody, ScoringBody
from lightllmd.api.dialects.scoring.replies import ClassifyReply, PoolingReply, RerankReply, ScorePairsReply
from lightllmd.api.inflight.revisions import Revisions
from lightllmd.api.web import bodies
from lightllmd.api.web.errors import openai_error
from lightllmd.api.web.ignored_fields import NamingRoute
from lightllmd.errors import LightllmdError

_SCORE = ("/score", "/v1/score")
_RERANK = ("/rerank", "/v1/rerank", "/v2/rerank")


def _never(body: ScoringBody) -> bool:
    return False


def _size(body: ScoringBody) -> int:
    return body.answer_size


SCORE = Translation(ScorePairsBody, ScorePairsBody.asked, ScorePairsReply.of, _never, error_frame, _size)
RERANK = Translation(RerankBody, RerankBody.asked, RerankReply.of, _never, error_frame, _size)
CLASSIFY = Translation(ClassifyBody, ClassifyBody.asked, ClassifyReply.of, _never, error_frame, _size)
POOLING = Translation(PoolingBody, PoolingBody.asked, PoolingReply.of, _never, error_frame, _size)


def rerank_error(error: LightllmdError) -> dict[str, Any]:
    """OpenAI's envelope, as vLLM; beside it what Cohere's and Jina's clients look for."""
    return openai_error(error) | {"message": error.message, "detail": error.message}


def router(revisions: Revisions) -> APIRouter:
    """All but /rerank."""
    routes = APIRouter(tags=["scores"], route_class=NamingRoute)
    responder = Responder(revisions)

    async def score(request: Request) -> Response:
        """How well two texts fit, of one pair or of several."""
        return await responder.respond(request, SCORE)

    for path in _SCORE:
        routes.post(path, openapi_extra=bodies.documented(ScorePairsBody))(score)

    @routes.post("/classify", openapi_extra=bodies.documented(ClassifyBody))
    async def classify(request: Request) -> Response:
        """Which of the model's labels fits each text, or a conversation."""
        return await responder.respond(request, CLASSIFY)

    @routes.post("/pooling", openapi_extra=bodies.documented(PoolingBody))
    async def pooling(request: Request) -> Response:
        """What the model's head makes of each text, or of a conversation: its numbers as they are."""
        return await responder.respond(request, POOLING)

    return routes


def rerank_router(revisions: Revisions) -> APIRouter:
    """/rerank under each of its names."""
    routes = APIRouter(tags=["scores"], route_class=NamingRoute)
    responder = Responder(revisions)

    async def rerank(request: Request) -> Response:
        """Ranks documents by how well each fits a query."""
        return await responder.respond(request, RERANK)

    for path in _RERANK:
        routes.post(path, openapi_extra=bodies.documented(RerankBody))(rerank)
    return routes


DIALECT = Dialect(
    (*_SCORE, "/classify", "/pooling"), openai_error, (ScorePairsBody, ClassifyBody, PoolingBody), router, name="OpenAI"
)
RERANKING = Dialect(_RERANK, rerank_error, (RerankBody,), rerank_router, name="Cohere and Jina")
