"""LightLLM's own routes: /generate, /generate_stream, / and /tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self, TypeVar

import msgspec
from fastapi import APIRouter
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from lightllmd.api.dialects.dialect import Dialect, Responder, Translation
from lightllmd.api.dialects.native.bodies import GenerateBody, GenerateOrStreamBody, TokensBody
from lightllmd.api.inflight.entry import Entry
from lightllmd.api.inflight.event_stream import Frames
from lightllmd.api.inflight.pending import Pending
from lightllmd.api.inflight.revision import Revision
from lightllmd.api.inflight.revisions import Revisions
from lightllmd.api.web import bodies
from lightllmd.api.web.errors import native_error
from lightllmd.api.web.ignored_fields import NamingRoute
from lightllmd.api.web.responses import json_response, on_each
from lightllmd.errors import RequestError
from lightllmd.requests.asked import Prompt
from lightllmd.requests.branch import Branch
from lightllmd.requests.intake import AdmittedJob

Kind = TypeVar("Kind", bound=GenerateBody)
_json = msgspec.json.Encoder()


class ShownToken(msgspec.Struct):
    """One token as streams and `return_details` show it."""

    id: int
    text: str
    logprob: float
    special: bool
    count_output_tokens: int  # tokens of this sequence up to and with this one
    prompt_tokens: int


class DetailedToken(ShownToken):
    """As `return_details` shows it."""

    prompt_cache_len: int  # tokens of the prompt that were found in the prompt cache
    cumlogprob: float | UnsetType = UNSET  # sum of the log-probabilities up to and with this one


class Frame(msgspec.Struct):
    """One event of a stream; the names are the original's."""

    token: ShownToken
    generated_text: str | None
    finished: bool
    finish_reason: str | None
    details: None = None


NO_TOKEN = -1  # the id in the last frame of an answer that was broken off; its text is empty


class TokenFrames(Frames):
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
            shown = ShownToken(
                token, branch.texts[index], branch.logprobs[index], token in special, index + 1, prompt_tokens
            )
            parts.append(b"data:%b\n\n" % encode(Frame(shown, None, finish is not None, finish)))
        if aborted:
            shown = ShownToken(NO_TOKEN, "", 0.0, True, count, prompt_tokens)
            parts.append(b"data:%b\n\n" % encode(Frame(shown, None, True, "abort")))
        return b"".join(parts)

    def end(self) -> bytes:
        return b""

    def error(self, error: RequestError) -> bytes:
        return error_frame(error)


def error_frame(error: RequestError) -> bytes:
    """The end of a stream that can't go on."""
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


@dataclass(frozen=True)
class GeneratedReply:
    """Of /generate and /generate_stream."""

    special: frozenset[int]
    return_details: bool
    tells_totals: bool

    @classmethod
    async def of(cls, revision: Revision, body: GenerateBody, jobs: Sequence[AdmittedJob]) -> Self:
        """See `Translation`."""
        return cls(revision.special_ids, body.parameters.return_details, revision.intake.tells_totals)

    def whole(self, pending: Pending) -> dict[str, Any]:
        """See `Reply`."""
        (entry,) = pending.entries
        return generated(entry, self.special, self.return_details, self.tells_totals)

    def frames(self, pending: Pending) -> TokenFrames:
        """See `Reply`."""
        return TokenFrames(pending.entries[0], self.special)


def _always(body: GenerateBody) -> bool:
    return True


def _never(body: GenerateBody) -> bool:
    return False


def _as_asked(body: GenerateOrStreamBody) -> bool:
    return body.stream


def _translation(body: type[Kind], streamed: Callable[[Kind], bool]) -> Translation[Kind]:
    return Translation(body, lambda one: one.asked(streamed=streamed(one)), GeneratedReply.of, streamed, error_frame)


def generating(revisions: Revisions) -> APIRouter:
    """The routes that generate."""
    routes = APIRouter(tags=["lightllm"], route_class=NamingRoute)
    responder = Responder(revisions)

    @routes.post("/generate", openapi_extra=bodies.documented(GenerateBody))
    async def generate(request: Request) -> Response:
        """Generates, then answers with the whole text."""
        return await responder.respond(request, _translation(GenerateBody, _never))

    @routes.post("/generate_stream", openapi_extra=bodies.documented(GenerateBody, streams="always"))
    async def generate_stream(request: Request) -> Response:
        """Server-sent events, one frame per token."""
        return await responder.respond(request, _translation(GenerateBody, _always))

    @routes.post("/", openapi_extra=bodies.documented(GenerateOrStreamBody))
    async def either(request: Request) -> Response:
        """/generate_stream if `stream` is true, else /generate."""
        return await responder.respond(request, _translation(GenerateOrStreamBody, _as_asked))

    return routes


def counting(revisions: Revisions) -> APIRouter:
    """The route that counts a text's tokens."""
    routes = APIRouter(tags=["lightllm"], route_class=NamingRoute)
    parse = bodies.parser(revisions.current.http, revisions.decode)

    @on_each(routes, "/tokens", ["GET", "POST"], openapi_extra=bodies.documented(TokensBody))
    async def tokens(request: Request) -> Response:
        """Counts a text's tokens, special ones and those of images included."""
        body = await parse(request, TokensBody)
        special, revision = body.parameters.add_special_tokens, revisions.current
        if images := body.multimodal_params.asked():
            ids = await revision.intake.ids(Prompt(body.text, "text", False, images), add_special_tokens=special)
            return json_response({"ntokens": len(ids)})
        count = await revision.texts.count(body.text, add_special_tokens=special)
        return json_response({"ntokens": count})

    return routes


GENERATING = Dialect(("/",), native_error, (GenerateBody, GenerateOrStreamBody), generating, name="LightLLM")
COUNTING = Dialect(("/tokens",), native_error, (TokensBody,), counting, name="LightLLM")
