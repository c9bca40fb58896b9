"""The OpenAI routes: /v1/models, /v1/completions, /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lightllmd.api import bodies
from lightllmd.api.choices import ChatShape, Choice, Chunks, CompletionShape, Shape, error_frame, usage
from lightllmd.api.frontend import FrontEnd, Job, TextOptions
from lightllmd.api.openai_bodies import ChatBody, CompletionBody, OpenAIBody
from lightllmd.api.reply import EventStream, Pending
from lightllmd.api.responses import json_response
from lightllmd.api.revisions import Revisions
from lightllmd.errors import NotFound

Kind = TypeVar("Kind", bound=OpenAIBody)


def job(front: FrontEnd, body: OpenAIBody, prompt_ids: list[int], field: str) -> Job:
    """Checks lengths; `max_tokens` defaults to what fits. Raises InvalidRequest."""
    limits = front.limits
    prompt_ids = limits.prompt(prompt_ids, field)
    limits.branches(body.branches, "n")
    new_tokens = body.asked_tokens
    if new_tokens is None:
        new_tokens = limits.room(len(prompt_ids))
    limits.new_tokens(len(prompt_ids), max(1, new_tokens), "max_tokens" if body.asked_tokens else field)
    text = TextOptions(
        body.stops,
        include_stop=False,
        skip_special_tokens=body.skip_special_tokens,
        spaces_between_special_tokens=False,  # a native habit; clients parse what added tokens mark, such as tool calls
    )
    return Job(prompt_ids, body.sampling(new_tokens), body.folded_seed, text)


async def completion_jobs(front: FrontEnd, body: CompletionBody) -> list[Job]:
    prompts = body.prompts
    front.limits.at_once(len(prompts) * body.branches, "prompt")
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(await front.encode_batch(texts))
    jobs = []
    for index, prompt in enumerate(prompts):
        ids = next(encoded) if isinstance(prompt, str) else prompt
        jobs.append(job(front, body, ids, "prompt" if len(prompts) == 1 else f"prompt.{index}"))
    return jobs


async def chat_jobs(front: FrontEnd, body: ChatBody) -> list[Job]:
    ids = await front.encode_chat([message.model_dump() for message in body.messages])
    return [job(front, body, ids, "messages")]


def choices_of(pending: Pending, n: int) -> list[Choice]:
    """`n` per prompt, in the order of the prompts; of more branches than that the likeliest per token."""
    picked: list[Choice] = []
    for prompt, entry in enumerate(pending.entries):
        branches = entry.branches
        if len(branches) > n:
            branches = sorted(branches, key=lambda branch: -branch.cumulative_logprob / max(1, len(branch.ids)))[:n]
        picked += [Choice(len(picked) + index, prompt, branch) for index, branch in enumerate(branches)]
    return picked


def completion_shape(front: FrontEnd, body: CompletionBody) -> Shape:
    echoed = _echoed(front, body) if body.echo else ()
    return CompletionShape(_new_id("cmpl"), front.model_name, front.tokenizer, body.alternatives, echoed)


def chat_shape(front: FrontEnd, body: ChatBody) -> Shape:
    return ChatShape(_new_id("chatcmpl"), front.model_name, front.tokenizer, body.alternatives)


def model_card(name: str, created: int, served: FrontEnd | None) -> dict[str, Any]:
    """`served`: by whom, if now."""
    card = {"id": name, "object": "model", "created": created, "owned_by": "lightllmd", "served": served is not None}
    return card if served is None else card | {"max_model_len": served.limits.max_req_total_len}


def router(revisions: Revisions) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["openai"])
    limit = revisions.front.http.max_body_bytes
    admission = revisions.accounts.admission
    started = int(time.time())

    def cards() -> dict[str, dict[str, Any]]:
        """By name; the served one first."""
        front = revisions.front
        served = {front.model_name: model_card(front.model_name, started, front)}
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

    async def answer(
        request: Request,
        body: Kind,
        arrived_at: float,
        jobs_of: Callable[[FrontEnd, Kind], Awaitable[list[Job]]],
        shape_of: Callable[[FrontEnd, Kind], Shape],
    ) -> Response:
        with admission():
            async with revisions.entered(request.receive) as front:
                revisions.check_name(front, body.model)
                pending = front.open(await jobs_of(front, body), arrived_at)
        shape = shape_of(front, body)
        if body.stream:
            chunks = Chunks(shape, choices_of(pending, body.n or 1), pending.entries, body.include_usage)
            return EventStream(pending, chunks, revisions.streams)
        await pending.finish(request.receive)
        return json_response(
            {
                "id": shape.id,
                "object": shape.object,
                "created": shape.created,
                "model": shape.model,
                "choices": [shape.whole(choice) for choice in choices_of(pending, body.n or 1)],
                "usage": usage(pending.entries),
            }
        )

    @routes.post("/completions", openapi_extra=bodies.documented(CompletionBody))
    async def completions(request: Request) -> Response:
        """Continues one prompt or several, given as text or as token ids."""
        arrived_at = time.monotonic()
        with admission():
            body = await bodies.parse(request, CompletionBody, limit)
        make = partial(answer, request, body, arrived_at, completion_jobs, completion_shape)
        return await (revisions.stream(make, error_frame) if body.stream else make())

    @routes.post("/chat/completions", openapi_extra=bodies.documented(ChatBody))
    async def chat_completions(request: Request) -> Response:
        """Answers a conversation, rendered by the model's own chat template."""
        arrived_at = time.monotonic()
        with admission():
            body = await bodies.parse(request, ChatBody, limit)
        make = partial(answer, request, body, arrived_at, chat_jobs, chat_shape)
        return await (revisions.stream(make, error_frame) if body.stream else make())

    return routes


def _new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _echoed(front: FrontEnd, body: CompletionBody) -> Sequence[str]:
    return [
        prompt if isinstance(prompt, str) else front.tokenizer.decode(prompt, skip_special_tokens=False)
        for prompt in body.prompts
    ]
