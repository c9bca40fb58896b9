"""LightLLM's /get_score: the score of a conversation that the client has templated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lightllmd.api.dialects.dialect import Dialect, Responder, Translation
from lightllmd.api.dialects.native.routes import error_frame
from lightllmd.api.inflight.pending import Pending
from lightllmd.api.inflight.revision import Revision
from lightllmd.api.inflight.revisions import Revisions
from lightllmd.api.web import bodies
from lightllmd.api.web.errors import native_error
from lightllmd.api.web.ignored_fields import NamingRoute
from lightllmd.requests.fields import Body
from lightllmd.requests.scoring import ScoredPrompt, ScoresAsked, ScoringJob
from lightllmd.requests.urgency import UrgencyFields


class ScoreBody(UrgencyFields, Body):
    """A conversation as text, with the special tokens that the model's chat template puts around its turns."""

    described = True
    lenient = True

    chat: str

    def asked(self) -> ScoresAsked:
        """Its text as a prompt."""
        return ScoresAsked([ScoredPrompt(self.chat, "chat")], prompts_field="chat")


@dataclass(frozen=True)
class ScoreReply:
    """A number where the model has one label and reads the prompt's end; with several labels a list of one for each;
    of a process-reward model a list of these, one for each step."""

    labels: int
    steps: bool

    @classmethod
    async def of(cls, revision: Revision, body: ScoreBody, jobs: Sequence[ScoringJob]) -> Self:
        """See `Translation`."""
        scoring = revision.plan.scoring
        assert scoring is not None  # the intake has made jobs of it
        return cls(len(scoring.labels), scoring.marker is not None)

    def whole(self, pending: Pending) -> dict[str, Any]:
        """See `WholeReply`."""
        (entry,) = pending.entries
        scores: list[Any] = [vector[0] if self.labels == 1 else vector for vector in entry.values]
        return {
            "score": scores if self.steps else scores[0],
            "prompt_tokens": entry.prompt_tokens,
            "finish_reason": "stop",
        }


def router(revisions: Revisions) -> APIRouter:
    """The route of reward models in the native API."""
    routes = APIRouter(tags=["lightllm"], route_class=NamingRoute)
    responder = Responder(revisions)
    translation = Translation(ScoreBody, ScoreBody.asked, ScoreReply.of, lambda body: False, error_frame)

    @routes.post("/get_score", openapi_extra=bodies.documented(ScoreBody))
    async def get_score(request: Request) -> Response:
        """The score of a templated conversation, by a server with a reward model."""
        return await responder.respond(request, translation)

    return routes


DIALECT = Dialect(("/get_score",), native_error, (ScoreBody,), router, name="LightLLM")
