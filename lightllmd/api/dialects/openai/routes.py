"""The OpenAI routes: /v1/models, /v1/completions, /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lightllmd import __version__
from lightllmd.api.dialects.dialect import Dialect, Responder, Translation
from lightllmd.api.dialects.openai.bodies import ChatBody, CompletionBody, OpenAIBody
from lightllmd.api.dialects.openai.chat_shape import ChatShape, Speech
from lightllmd.api.dialects.openai.choices import Choice, Chunks, Details, Shape, error_frame
from lightllmd.api.dialects.openai.completion_shape import CompletionShape, PromptText, prompt_text
from lightllmd.api.helpers.texts import off_loop
from lightllmd.api.inflight.pending import Pending
from lightllmd.api.inflight.revision import Revision
from lightllmd.api.inflight.revisions import TGI_MODEL, Revisions
from lightllmd.api.web import bodies
from lightllmd.api.web.errors import openai_error
from lightllmd.api.web.ignored_fields import NamingRoute
from lightllmd.api.web.responses import json_response
from lightllmd.errors import NotFound
from lightllmd.requests.intake import AdmittedJob

_TOKEN_COST = 8  # characters that are tokenised in the time that a token of a prompt takes to be looked up


def choices_of(pending: Pending, n: int, beams: bool) -> list[Choice]:
    """`n` per prompt, in the order of the prompts; of more branches than that the best: of beams, which are in that
    order, the first, else the likeliest per token, as OpenAI says of best_of."""
    picked: list[Choice] = []
    for prompt, entry in enumerate(pending.entries):
        branches = entry.branches
        if len(branches) > n and not beams:
            branches = sorted(branches, key=lambda branch: -branch.cumulative_logprob / max(1, len(branch.ids)))
        picked += [Choice(len(picked) + index, prompt, entry, branch) for index, branch in enumerate(branches[:n])]
    return picked


def completion_shape(revision: Revision, body: CompletionBody, jobs: Sequence[AdmittedJob]) -> Shape:
    """Looks the texts and places of the prompts' tokens up, where the answer shows them."""
    prompts: list[PromptText] = []
    if body.echo or body.logprobs is not None:
        prompts = [
            prompt_text(
                revision.tokenizer,
                prompt,
                job,
                scored=body.scored_echo >= 0,
                add_special_tokens=body.add_special_tokens,
            )
            for prompt, job in zip(body.prompts, jobs, strict=True)
        ]
    return CompletionShape(
        _new_id("cmpl"),
        revision.model_name,
        revision.tokenizer,
        _details(revision, body),
        prompts,
        echo=bool(body.echo),
    )


@dataclass(frozen=True)
class OpenAIReply:
    """Of both routes that generate."""

    shape: Shape
    body: OpenAIBody
    beams: bool

    def whole(self, pending: Pending) -> dict[str, Any]:
        """See `Reply`."""
        return self.shape.answer(self._choices(pending), pending.entries)

    def frames(self, pending: Pending) -> Chunks:
        """See `Reply`."""
        return Chunks(self.shape, self._choices(pending), pending.entries, self.body.usage_told)

    def _choices(self, pending: Pending) -> list[Choice]:
        return choices_of(pending, self.body.n or 1, self.beams)


async def completion_reply(revision: Revision, body: CompletionBody, jobs: Sequence[AdmittedJob]) -> OpenAIReply:
    """See `Translation`."""
    size = sum(len(job.given_ids) for job in jobs) * _TOKEN_COST
    shape = await off_loop(size, completion_shape, revision, body, jobs)
    return OpenAIReply(shape, body, revision.intake.beams)


async def chat_reply(revision: Revision, body: ChatBody, jobs: Sequence[AdmittedJob]) -> OpenAIReply:
    """See `Translation`."""
    speech = Speech(jobs[0].parsers, body.include_reasoning, body.as_functions)
    shape = ChatShape(_new_id("chatcmpl"), revision.model_name, revision.tokenizer, _details(revision, body), speech)
    return OpenAIReply(shape, body, revision.intake.beams)


def _streamed(body: OpenAIBody) -> bool:
    return bool(body.stream)


COMPLETIONS = Translation(CompletionBody, CompletionBody.asked, completion_reply, _streamed, error_frame)
CHAT = Translation(ChatBody, ChatBody.asked, chat_reply, _streamed, error_frame)


def model_card(name: str, created: int, served: Revision | None) -> dict[str, Any]:
    """`served`: the revision that serves it now; None: it isn't served."""
    card = {"id": name, "object": "model", "created": created, "owned_by": "lightllmd", "served": served is not None}
    if served is None:
        return card
    limits = served.limits
    return card | {"max_model_len": limits.max_req_total_len, "vocab_size": limits.vocab_size}


def router(revisions: Revisions) -> APIRouter:
    """The OpenAI routes."""
    routes = APIRouter(prefix="/v1", tags=["openai"], route_class=NamingRoute)
    responder = Responder(revisions)
    started = int(time.time())

    def cards() -> dict[str, dict[str, Any]]:
        """By name; the served one first."""
        revision = revisions.current
        served = {revision.model_name: model_card(revision.model_name, started, revision)}
        return served | {name: model_card(name, started, None) for name in revisions.others()}

    @routes.get("/models")
    async def models() -> Response:
        """The served model, and those that could be swapped in."""
        return json_response({"object": "list", "data": list(cards().values())})

    @routes.get("/models/{name:path}")
    async def model(name: str) -> Response:
        known = cards()
        if name not in known:
            raise NotFound(f"model: {name!r} is not one of {', '.join(known)}", code="model_not_found")
        return json_response(known[name])

    @routes.post("/completions", openapi_extra=bodies.documented(CompletionBody))
    async def completions(request: Request) -> Response:
        """Continues one prompt or several, given as text or as token ids."""
        return await responder.respond(request, COMPLETIONS)

    @routes.post("/chat/completions", openapi_extra=bodies.documented(ChatBody))
    async def chat_completions(request: Request) -> Response:
        """Answers a conversation, rendered by the model's own chat template."""
        return await responder.respond(request, CHAT)

    return routes


def _new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _details(revision: Revision, body: OpenAIBody) -> Details:
    scores_prompt = body.prompt_logprobs is not None or revision.intake.scores_prompts
    tgi = revision.plan.config.params.use_tgi_api
    return Details(
        body.alternatives,
        scores_prompt,
        body.return_token_ids,
        body.return_tokens_as_token_ids,
        fingerprint=f"{__version__}-lightllmd" if tgi else None,
        as_tgi=tgi and body.model == TGI_MODEL,
    )


DIALECT = Dialect(("/v1/",), openai_error, (CompletionBody, ChatBody), router, name="OpenAI")
