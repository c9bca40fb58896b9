"""The OpenAI routes: /v1/models, /v1/completions, /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lightllmd.api import bodies
from lightllmd.api.choices import ChatShape, Choice, Chunks, CompletionShape, Shape, usage
from lightllmd.api.frontend import FrontEnd, Job, TextOptions
from lightllmd.api.openai_bodies import ChatBody, CompletionBody, OpenAIBody
from lightllmd.api.reply import EventStream, Pending
from lightllmd.api.responses import json_response
from lightllmd.errors import NotFound


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


async def chat_job(front: FrontEnd, body: ChatBody) -> Job:
    ids = await front.encode_chat([message.model_dump() for message in body.messages])
    return job(front, body, ids, "messages")


def known_models(front: FrontEnd) -> list[str]:
    return [front.model_name, *(name for name in front.plan.config.models if name != front.model_name)]


def check_model(front: FrontEnd, name: str | None) -> None:
    """Any name will do while one model is configured. Raises NotFound."""
    known = known_models(front)
    if name is not None and len(known) > 1 and name not in known:
        raise NotFound(f"model: {name!r} is not one of {', '.join(known)}", param="model", code="model_not_found")


def choices_of(pending: Pending, n: int) -> list[Choice]:
    """`n` per prompt, in the order of the prompts; of more branches than that the likeliest per token."""
    picked: list[Choice] = []
    for prompt, entry in enumerate(pending.entries):
        branches = entry.branches
        if len(branches) > n:
            branches = sorted(branches, key=lambda branch: -branch.cumulative_logprob / max(1, len(branch.ids)))[:n]
        picked += [Choice(len(picked) + index, prompt, branch) for index, branch in enumerate(branches)]
    return picked


async def respond(front: FrontEnd, request: Request, body: OpenAIBody, pending: Pending, shape: Shape) -> Response:
    if body.stream:
        chunks = Chunks(shape, choices_of(pending, body.n or 1), pending.entries, body.include_usage)
        return EventStream(pending, chunks, front.streams)
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


def model_card(name: str, created: int, front: FrontEnd) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "lightllmd",
        "max_model_len": front.limits.max_req_total_len,
    }


def router(front: FrontEnd) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["openai"])
    limit = front.http.max_body_bytes
    started = int(time.time())

    @routes.get("/models")
    async def models() -> Response:
        """The served model, and those that could be swapped in."""
        cards = [model_card(name, started, front) for name in known_models(front)]
        return json_response({"object": "list", "data": cards})

    @routes.get("/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in known_models(front):
            raise NotFound(f"model: {name!r} is not one of {', '.join(known_models(front))}", code="model_not_found")
        return json_response(model_card(name, started, front))

    @routes.post("/completions", openapi_extra=bodies.documented(CompletionBody))
    async def completions(request: Request) -> Response:
        """Continues one prompt or several, given as text or as token ids."""
        with front.accounts.admission() as arrived_at:
            body = await bodies.parse(request, CompletionBody, limit)
            check_model(front, body.model)
            jobs = await completion_jobs(front, body)
            pending = front.open(jobs, arrived_at)
        echoed = _echoed(front, body) if body.echo else ()
        shape = CompletionShape(_new_id("cmpl"), front.model_name, front.tokenizer, body.alternatives, echoed)
        return await respond(front, request, body, pending, shape)

    @routes.post("/chat/completions", openapi_extra=bodies.documented(ChatBody))
    async def chat_completions(request: Request) -> Response:
        """Answers a conversation, rendered by the model's own chat template."""
        with front.accounts.admission() as arrived_at:
            body = await bodies.parse(request, ChatBody, limit)
            check_model(front, body.model)
            pending = front.open([await chat_job(front, body)], arrived_at)
        shape = ChatShape(_new_id("chatcmpl"), front.model_name, front.tokenizer, body.alternatives)
        return await respond(front, request, body, pending, shape)

    return routes


def _new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _echoed(front: FrontEnd, body: CompletionBody) -> Sequence[str]:
    return [
        prompt if isinstance(prompt, str) else front.tokenizer.decode(prompt, skip_special_tokens=False)
        for prompt in body.prompts
    ]
