"""LightLLM's own routes: /generate, /generate_stream, / and /tokens."""

from __future__ import annotations

import time
from functools import partial
from itertools import accumulate
from typing import Any

import msgspec
from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from lightllmd.api.dialects.native_bodies import GenerateBody, GenerateOrStreamBody, TokensBody
from lightllmd.api.inflight.entry import Entry
from lightllmd.api.inflight.frontend import STOP_COST, FrontEnd, off_loop
from lightllmd.api.inflight.reply import EventStream, Pending
from lightllmd.api.inflight.revisions import Revisions
from lightllmd.api.web import bodies
from lightllmd.api.web.ignored_fields import NamingRoute
from lightllmd.api.web.responses import encoded_response, json_in_parts, json_response, on_each
from lightllmd.errors import InvalidRequest, RequestError
from lightllmd.requests.branch import Branch
from lightllmd.requests.intake import Job

_json = msgspec.json.Encoder()


class Token(msgspec.Struct):
    """One token as streams and `return_details` show it."""

    id: int
    text: str
    logprob: float
    special: bool
    count_output_tokens: int  # tokens of this sequence up to and with this one
    prompt_tokens: int


class DetailedToken(Token):
    prompt_cache_len: int  # tokens of the prompt that were found in the prompt cache
    cumlogprob: float | UnsetType = UNSET  # sum of the log-probabilities up to and with this one


class Frame(msgspec.Struct):
    token: Token
    generated_text: str | None
    finished: bool
    finish_reason: str | None
    details: None = None


NO_TOKEN = -1  # the id in the last frame of an answer that was broken off; its text is empty


class TokenFrames:
    """One frame per token, of the only branch of `entry`; "abort" comes without a token, in a frame of its own."""

    def __init__(self, entry: Entry, special: frozenset[int]) -> None:
        self.branch = entry.branches[0]
        self.prompt_tokens = entry.prompt_tokens
        self.special = special
        self.sent = 0

    def take(self) -> bytes:
        branch, special, prompt_tokens, encode = self.branch, self.special, self.prompt_tokens, _json.encode
        first, count = self.sent, len(branch.ids)
        aborted = branch.finish == "abort"
        if first == count and not aborted:
            return b""
        self.sent = count
        parts = []
        for index in range(first, count):
            token = branch.ids[index]
            finish = branch.finish if index + 1 == count and not aborted else None
            shown = Token(
                token, branch.texts[index], branch.logprobs[index], token in special, index + 1, prompt_tokens
            )
            parts.append(b"data:%b\n\n" % encode(Frame(shown, None, finish is not None, finish)))
        if aborted:
            shown = Token(NO_TOKEN, "", 0.0, True, count, prompt_tokens)
            parts.append(b"data:%b\n\n" % encode(Frame(shown, None, True, "abort")))
        return b"".join(parts)

    def end(self) -> bytes:
        return b""

    def error(self, error: RequestError) -> bytes:
        return error_frame(error)


def error_frame(error: RequestError) -> bytes:
    return b"data:%b\n\n" % _json.encode({"message": error.message, "status": error.status})


def detailed_tokens(entry: Entry, branch: Branch, special: frozenset[int], totals: bool) -> list[DetailedToken]:
    """`totals`: with cumulative log-probabilities."""
    rows = zip(branch.ids, branch.texts, branch.logprobs, accumulate(branch.logprobs), strict=True)
    return [
        DetailedToken(
            token,
            text,
            logprob,
            token in special,
            index + 1,
            entry.prompt_tokens,
            entry.cached,
            total if totals else UNSET,
        )
        for index, (token, text, logprob, total) in enumerate(rows)
    ]


def generated(entry: Entry, special: frozenset[int], return_details: bool, tells_totals: bool) -> dict[str, Any]:
    """The 200 body of /generate: scalars for one sequence, lists for several. `tells_totals`: the tokens of several
    have cumulative log-probabilities."""
    counts: list[Any] = [len(branch.ids) for branch in entry.branches]
    reasons: list[Any] = [branch.finish for branch in entry.branches]
    several = len(entry.branches) > 1
    body = {
        "generated_text": [branch.text for branch in entry.branches],
        "count_output_tokens": counts if several else counts[0],
        "finish_reason": reasons if several else reasons[0],
        "prompt_tokens": entry.prompt_tokens,
    }
    if return_details:
        totals = several and tells_totals
        tokens: list[Any] = [detailed_tokens(entry, branch, special, totals) for branch in entry.branches]
        body["tokens"] = tokens if several else tokens[0]
    if entry.params.prompt_logprobs >= 0:
        body["prompt_token_ids"] = entry.prompt_ids
        body["prompt_logprobs"] = entry.prompt_log.pairs(entry.prompt_ids)
    return body


async def prepare(front: FrontEnd, body: GenerateBody, streamed: bool) -> Job:
    """Tokenises and checks what only the plan knows. Raises InvalidRequest."""
    parameters = body.parameters
    front.limits.branches(parameters.sequences, "parameters.best_of")
    (encoded,) = await front.encode([body.inputs], ["inputs"], add_special_tokens=parameters.add_special_tokens)
    prompt_ids = front.limits.prompt(encoded, "inputs")
    front.limits.new_tokens(len(prompt_ids), parameters.new_tokens, parameters.sequences, "parameters.max_new_tokens")
    text = parameters.text()
    await off_loop(text.stops.size * STOP_COST, text.stops.build)
    for ids in text.stops.ids:
        front.limits.token_ids(ids, "parameters.stop_sequences")
    bad_words = await front.bad_words(parameters.bad_texts, "parameters.bad_words")
    return front.intake.job(
        prompt_ids,
        front.intake.params(parameters.sampling(), bad_words, "parameters."),
        parameters.drawn_seed,
        text,
        cut=prompt_ids is not encoded,
        heals=True,
        shows_prompt=not streamed,
    )


def streamable(body: GenerateBody) -> None:
    """Raises InvalidRequest for what a stream can't do. Its frames have no place for log-probabilities of the prompt;
    return_all_prompt_logprobs is about answers in one piece."""
    asked, logprobs = body.parameters.sequences, body.parameters.prompt_logprobs
    if asked != 1:
        raise InvalidRequest(f"parameters.best_of: a stream has one sequence, so should be 1; got {asked}")
    if logprobs is not None:
        raise InvalidRequest(
            f"parameters.prompt_logprobs: a stream doesn't show them, so should be absent; got {logprobs}"
        )


def router(revisions: Revisions) -> APIRouter:
    routes = APIRouter(tags=["lightllm"], route_class=NamingRoute)
    parse = bodies.parser(revisions.front.http, lambda: revisions.front.decode)
    admission = revisions.accounts.admission

    async def opened(
        request: Request, body: GenerateBody, arrived_at: float, *, streamed: bool
    ) -> tuple[FrontEnd, Pending]:
        with admission():
            async with revisions.entered(request.receive) as front:
                return front, front.open([await prepare(front, body, streamed)], arrived_at, request.scope)

    async def whole(request: Request, body: GenerateBody, arrived_at: float) -> Response:
        front, pending = await opened(request, body, arrived_at, streamed=False)
        await pending.finish(request.receive)
        (entry,) = pending.entries
        details, totals = body.parameters.return_details, front.intake.tells_totals
        size = entry.answer_size
        special = front.special_ids
        answer = await off_loop(size, lambda: json_in_parts(generated(entry, special, details, totals)))
        return encoded_response(answer)

    async def stream(request: Request, body: GenerateBody, arrived_at: float) -> EventStream:
        front, pending = await opened(request, body, arrived_at, streamed=True)
        return EventStream(pending, TokenFrames(pending.entries[0], front.special_ids), revisions.streams)

    @routes.post("/generate", openapi_extra=bodies.documented(GenerateBody))
    async def generate(request: Request) -> Response:
        """Generates, then answers with the whole text."""
        arrived_at = time.monotonic()
        with admission():
            body = await parse(request, GenerateBody)
        return await whole(request, body, arrived_at)

    @routes.post("/generate_stream", openapi_extra=bodies.documented(GenerateBody))
    async def generate_stream(request: Request) -> Response:
        """Server-sent events, one frame per token."""
        arrived_at = time.monotonic()
        with admission():
            body = await parse(request, GenerateBody)
            streamable(body)
        return await revisions.stream(partial(stream, request, body, arrived_at), error_frame)

    @routes.post("/", openapi_extra=bodies.documented(GenerateOrStreamBody))
    async def either(request: Request) -> Response:
        """/generate_stream if `stream` is true, else /generate."""
        arrived_at = time.monotonic()
        with admission():
            body = await parse(request, GenerateOrStreamBody)
            if body.stream:
                streamable(body)
        if body.stream:
            return await revisions.stream(partial(stream, request, body, arrived_at), error_frame)
        return await whole(request, body, arrived_at)

    @on_each(routes, "/tokens", ["GET", "POST"], openapi_extra=bodies.documented(TokensBody))
    async def tokens(request: Request) -> Response:
        """Counts a text's tokens, special ones included."""
        body = await parse(request, TokensBody)
        special = body.parameters.add_special_tokens
        return json_response({"ntokens": await revisions.front.count(body.text, add_special_tokens=special)})

    return routes
