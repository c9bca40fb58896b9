"""OpenAI's /v1/embeddings, with vLLM's fields for what is cut, normalised and told as bytes."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import msgspec
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from lightllmd.api.dialects.dialect import Dialect, Responder, Translation
from lightllmd.api.dialects.openai.choices import error_frame, usage
from lightllmd.api.dialects.scoring.bodies import PromptsBody
from lightllmd.api.dialects.vectors import base64_of
from lightllmd.api.inflight.entry import Entry
from lightllmd.api.inflight.pending import Pending
from lightllmd.api.inflight.revision import Revision
from lightllmd.api.inflight.revisions import Revisions
from lightllmd.api.web import bodies
from lightllmd.api.web.errors import openai_error
from lightllmd.api.web.ignored_fields import NamingRoute
from lightllmd.requests.fields import MAX_COUNT
from lightllmd.requests.scoring import ScoresAsked, ScoringJob

PATH = "/v1/embeddings"


class EmbeddingsBody(PromptsBody):
    """The body of /v1/embeddings."""

    described = True

    use_activation: bool | None = Field(
        default=None, description="each embedding is divided by its length; absent: as the model's settings say"
    )
    dimensions: int | None = Field(
        default=None,
        ge=1,
        le=MAX_COUNT,
        description="the first so many values of each embedding are told, divided by their length",
    )
    encoding_format: Literal["float", "base64"] = "float"
    embed_dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description="of base64")
    endianness: Literal["native", "big", "little"] = Field(default="native", description="of base64")

    def asked(self) -> ScoresAsked:
        """See `Translation`."""
        return replace(super().asked(), embeds=True, dimensions=self.dimensions, unit=self.use_activation)


@dataclass(frozen=True)
class EmbeddingsReply:
    """A vector for each prompt."""

    body: EmbeddingsBody
    model: str

    @classmethod
    async def of(cls, revision: Revision, body: EmbeddingsBody, jobs: Sequence[ScoringJob]) -> Self:
        """See `Translation`."""
        return cls(body, revision.model_name)

    def whole(self, pending: Pending) -> dict[str, Any]:
        """See `WholeReply`. Of the vectors only one is there as numbers at a time."""
        data = [
            {"object": "embedding", "index": index, "embedding": self._told(entry)}
            for index, entry in enumerate(pending.entries)
        ]
        used = usage(pending.entries, 0)
        del used["completion_tokens"]
        return {"object": "list", "data": data, "model": self.model, "usage": used}

    def _told(self, entry: Entry) -> msgspec.Raw | str:
        body = self.body
        if body.encoding_format == "float":
            (values,) = entry.values
            return msgspec.Raw(msgspec.json.encode(values))
        if (body.embed_dtype, body.endianness) == ("float32", "native"):
            return b64encode(entry.vectors[0]).decode()
        return base64_of(entry.values, body.embed_dtype, body.endianness)


EMBEDDINGS = Translation(
    EmbeddingsBody,
    EmbeddingsBody.asked,
    EmbeddingsReply.of,
    lambda body: False,
    error_frame,
    lambda body: body.answer_size,
)


def router(revisions: Revisions) -> APIRouter:
    """The route of every model that doesn't score."""
    routes = APIRouter(tags=["openai"], route_class=NamingRoute)
    responder = Responder(revisions)

    @routes.post(PATH, openapi_extra=bodies.documented(EmbeddingsBody))
    async def embeddings(request: Request) -> Response:
        """A vector of the model's last hidden states for each text, list of token ids, or a conversation."""
        return await responder.respond(request, EMBEDDINGS)

    return routes


DIALECT = Dialect((PATH,), openai_error, (EmbeddingsBody,), router, name="OpenAI")
