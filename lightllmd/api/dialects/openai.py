"""The OpenAI routes: /v1/models, /v1/completions, /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lightllmd.api.dialects.choices import (
    ChatShape,
    Choice,
    Chunks,
    CompletionShape,
    Details,
    PromptText,
    Shape,
    error_frame,
)
from lightllmd.api.dialects.common_fields import MAX_COUNT
from lightllmd.api.dialects.openai_bodies import ChatBody, CompletionBody, OpenAIBody
from lightllmd.api.inflight.frontend import STOP_COST, FrontEnd, off_loop
from lightllmd.api.inflight.reply import EventStream, Pending
from lightllmd.api.inflight.revisions import Revisions
from lightllmd.api.web import bodies
from lightllmd.api.web.errors import naming
from lightllmd.api.web.ignored_fields import NamingRoute
from lightllmd.api.web.responses import encoded_response, json_in_parts, json_response
from lightllmd.errors import InvalidRequest, NotFound
from lightllmd.ipc.messages import SamplingParams
from lightllmd.requests.branch import TextOptions
from lightllmd.requests.intake import Job
from lightllmd.requests.limits import Ids
from lightllmd.text.offsets import begins, token_offsets
from lightllmd.text.stop import StopList

_JOB_COST = 64  # characters that are tokenised in the time that a job of a few tokens takes
_TOKEN_COST = 8  # the same of a prompt's token whose text and place are looked up
Kind = TypeVar("Kind", bound=OpenAIBody)


@dataclass(frozen=True)
class Asked:
    """What a body says once for all its prompts, checked."""

    params: SamplingParams  # `max_new_tokens` and what depends on it are each prompt's own
    text: TextOptions


async def asked(front: FrontEnd, body: OpenAIBody, prompts: int = 1) -> Asked:
    """Checks what only the plan knows. Raises InvalidRequest."""
    front.limits.branches(body.branches, "n" if body.branches == body.n else "best_of")
    beams = front.intake.beams and body.branches > 1
    if body.use_beam_search is not None and body.use_beam_search != beams:
        raise InvalidRequest(
            f"use_beam_search: with {body.branches} sequences and the server's beam_mode "
            f"{'on' if front.intake.beams else 'off'} it should be {_json(beams)}; got {_json(body.use_beam_search)}",
            param="use_beam_search",
        )
    bad_words = await front.bad_words(body.bad_texts, "bad_words")
    params = front.intake.params(body.sampling(body.asked_tokens or MAX_COUNT), bad_words, prompts=prompts)
    front.limits.token_ids(list(body.stop_token_ids or ()), "stop_token_ids")
    with naming("stop"):
        stops = StopList(body.stops, body.stop_ids)
    text = TextOptions(
        stops,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        spaces_between_special_tokens=False,  # a native habit; clients parse what added tokens mark, such as tool calls
        min_tokens=params.min_new_tokens,
        prompt_only=body.asked_tokens == 0,
    )
    await off_loop(text.stops.size * STOP_COST, text.stops.build)
    return Asked(params, text)


def job(front: FrontEnd, body: OpenAIBody, asked: Asked, given: Ids, field: str, *, heals: bool) -> Job:
    """`max_tokens` defaults to what fits. `heals`: the prompt is a text that is continued. Raises InvalidRequest."""
    limits, params = front.limits, asked.params
    prompt_ids = [*limits.prompt(_last(given, body.truncate_prompt_tokens, limits.max_req_input_len), field)]
    new_tokens = body.asked_tokens
    if new_tokens is None:
        new_tokens = max(1, body.default_tokens(limits.room(len(prompt_ids), body.branches)))
    limits.new_tokens(len(prompt_ids), new_tokens, body.branches, body.asking_field or field)
    new_tokens = max(1, new_tokens)
    if new_tokens != params.max_new_tokens:
        fewest = min(params.min_new_tokens, new_tokens)
        params = msgspec.structs.replace(params, max_new_tokens=new_tokens, min_new_tokens=fewest)
    return front.intake.job(
        prompt_ids,
        params,
        body.folded_seed,
        asked.text,
        cut=len(prompt_ids) != len(given),
        heals=heals,
        shows_prompt=not body.stream,
    )


async def completion_jobs(front: FrontEnd, body: CompletionBody) -> list[Job]:
    prompts = body.prompts
    front.limits.at_once(len(prompts) * body.branches, "prompt")
    shared = await asked(front, body, len(prompts))
    fields = [f"prompt.{index}" for index in range(len(prompts))] if len(prompts) > 1 else ["prompt"]
    named = [(prompt, field) for prompt, field in zip(prompts, fields, strict=True) if isinstance(prompt, str)]
    encoded = iter(
        await front.encode(
            [text for text, _ in named],
            [field for _, field in named],
            add_special_tokens=body.add_special_tokens,
            cut=body.truncate_prompt_tokens is not None,
        )
    )
    given = [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]

    def jobs() -> list[Job]:
        made = [
            job(front, body, shared, ids, field, heals=isinstance(prompt, str))
            for prompt, ids, field in zip(prompts, given, fields, strict=True)
        ]
        front.limits.scored(sum(len(one.given_ids) for one in made), made[0].params.prompt_logprobs)
        return made

    return await off_loop(sum(map(len, given)) // 4 + len(prompts) * _JOB_COST, jobs)


async def chat_jobs(front: FrontEnd, body: ChatBody) -> list[Job]:
    shared = await asked(front, body)
    messages = [message.plain() for message in body.messages]
    ids = await front.encode_chat(messages, body.rendering, cut=body.truncate_prompt_tokens is not None)
    return [job(front, body, shared, ids, "messages", heals=body.continue_final_message)]


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


def completion_shape(front: FrontEnd, body: CompletionBody, jobs: list[Job]) -> Shape:
    prompts: list[PromptText] = []
    if body.echo or body.logprobs is not None:
        prompts = [
            _prompt_text(front, prompt, job, scored=body.scored_echo >= 0, add_special_tokens=body.add_special_tokens)
            for prompt, job in zip(body.prompts, jobs, strict=True)
        ]
    return CompletionShape(
        _new_id("cmpl"),
        front.model_name,
        front.tokenizer,
        _details(front, body),
        prompts,
        echo=bool(body.echo),
    )


def chat_shape(front: FrontEnd, body: ChatBody, jobs: list[Job]) -> Shape:
    return ChatShape(_new_id("chatcmpl"), front.model_name, front.tokenizer, _details(front, body))


def model_card(name: str, created: int, served: FrontEnd | None) -> dict[str, Any]:
    """`served`: by whom, if now."""
    card = {"id": name, "object": "model", "created": created, "owned_by": "lightllmd", "served": served is not None}
    if served is None:
        return card
    limits = served.limits
    return card | {"max_model_len": limits.max_req_total_len, "vocab_size": limits.vocab_size}


def router(revisions: Revisions) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["openai"], route_class=NamingRoute)
    parse = bodies.parser(revisions.front.http, lambda: revisions.front.decode)
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
        shape_of: Callable[[FrontEnd, Kind, list[Job]], Shape],
    ) -> Response:
        with admission():
            async with revisions.entered(request.receive) as front:
                revisions.check_name(front, body.model)
                with naming(body.subject):
                    jobs = await jobs_of(front, body)
                size = sum(len(job.given_ids) for job in jobs) * _TOKEN_COST
                shape = await off_loop(size, shape_of, front, body, jobs)
                pending = front.open(jobs, arrived_at, request.scope)
        n, beams = body.n or 1, front.intake.beams
        if body.stream:
            chunks = Chunks(shape, choices_of(pending, n, beams), pending.entries, body.usage_told)
            return EventStream(pending, chunks, revisions.streams)
        await pending.finish(request.receive)
        size = sum(entry.answer_size for entry in pending.entries)
        choices = choices_of(pending, n, beams)
        return encoded_response(await off_loop(size, lambda: json_in_parts(shape.answer(choices, pending.entries))))

    @routes.post("/completions", openapi_extra=bodies.documented(CompletionBody))
    async def completions(request: Request) -> Response:
        """Continues one prompt or several, given as text or as token ids."""
        arrived_at = time.monotonic()
        with admission():
            body = await parse(request, CompletionBody)
        make = partial(answer, request, body, arrived_at, completion_jobs, completion_shape)
        return await (revisions.stream(make, error_frame) if body.stream else make())

    @routes.post("/chat/completions", openapi_extra=bodies.documented(ChatBody))
    async def chat_completions(request: Request) -> Response:
        """Answers a conversation, rendered by the model's own chat template."""
        arrived_at = time.monotonic()
        with admission():
            body = await parse(request, ChatBody)
        make = partial(answer, request, body, arrived_at, chat_jobs, chat_shape)
        return await (revisions.stream(make, error_frame) if body.stream else make())

    return routes


def _last(ids: Ids, most: int | None, fitting: int) -> Ids:
    """What `truncate_prompt_tokens` leaves of a prompt."""
    if most is None:
        return ids
    kept = fitting if most < 0 else most
    return ids if len(ids) <= kept else ids[-kept:] if kept else ids[:0]


def _json(value: bool) -> str:
    return "true" if value else "false"


def _new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _details(front: FrontEnd, body: OpenAIBody) -> Details:
    scores_prompt = body.prompt_logprobs is not None or front.intake.scores_prompts
    return Details(body.alternatives, scores_prompt, body.return_token_ids, body.return_tokens_as_token_ids)


def _prompt_text(
    front: FrontEnd, prompt: str | array[int], job: Job, *, scored: bool, add_special_tokens: bool
) -> PromptText:
    """A text is what came, unless it was cut. `scored`: the log-probabilities of its tokens are shown."""
    tokenizer, ids = front.tokenizer, job.given_ids
    whole = prompt if isinstance(prompt, str) and not job.cut else None
    if whole is not None and not scored:
        return PromptText(whole)
    hides = isinstance(prompt, str) and job.cut
    detokenizing = tokenizer.detokenizing(
        skip_special_tokens=hides, spaces_between_special_tokens=False, print_eos_token=None
    )
    stream = detokenizing.open()
    pieces = [stream.push([token]) for token in ids]
    if whole is not None:
        special = {index for index, token in enumerate(ids) if token in tokenizer.special_ids}
        spans = tokenizer.spans(whole, add_special_tokens)
        return PromptText(whole, token_offsets(whole, pieces, spans, special))
    text = "".join(pieces) + stream.flush()
    if not scored:
        return PromptText(text)
    own = tokenizer.vocabulary.text_length
    lengths = [0 if token in detokenizing.unshown else own(token) for token in ids]
    return PromptText(text, begins(map(len, pieces), lengths))
