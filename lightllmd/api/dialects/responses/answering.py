"""One request to /v1/responses: the conversation that it continues, what is asked of the engine, and the answer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from lightllmd.api.dialects.responses.bodies import ResponsesBody
from lightllmd.api.dialects.responses.items import Item, Turn, new_id, resolved, turns
from lightllmd.api.dialects.responses.reader import SequenceReader, token_logprobs
from lightllmd.api.dialects.responses.shape import EventWriter, ResponseShape, failure, usage
from lightllmd.api.dialects.responses.store import Kept, ResponseStore, StoredResponse
from lightllmd.api.helpers.texts import off_loop
from lightllmd.api.inflight.event_stream import Frames
from lightllmd.api.inflight.pending import Pending
from lightllmd.api.inflight.revision import Revision
from lightllmd.api.web.responses import json_in_parts
from lightllmd.dialogue.tools import MAX_SCHEMA
from lightllmd.errors import InvalidRequest, LightllmdError, NotReady, RequestFailed
from lightllmd.requests.asked import Asked, Chat, FieldNames, Prompt
from lightllmd.requests.branch import TextOptions
from lightllmd.requests.fields import MAX_COUNT
from lightllmd.requests.intake import AdmittedJob

log = logging.getLogger(__name__)

_TOOL_COST = MAX_SCHEMA // 16  # what a tool may have, most have much less
_ITEM_COST = 32  # characters that are copied in the time that an item's place in a prompt is found


class _Told(msgspec.Struct):
    """Of a response that is stored: its output."""

    output: list[msgspec.Raw]


def _decoded(items: Sequence[msgspec.Raw]) -> Iterator[Item]:
    return (msgspec.json.decode(item) for item in items)


def input_of(link: StoredResponse) -> list[Item]:
    """What a response was given."""
    return list(_decoded(msgspec.json.decode(link.input, type=list[msgspec.Raw])))


def output_of(link: StoredResponse) -> list[Item]:
    """What it answered."""
    return list(_decoded(msgspec.json.decode(link.answer, type=_Told).output))


def conversation(links: Sequence[StoredResponse]) -> list[Item]:
    """All items of responses that follow each other."""
    return [item for link in links for item in (*input_of(link), *output_of(link))]


def size_of(links: Sequence[StoredResponse]) -> int:
    """Of the work on them, as `off_loop` counts it."""
    return sum(len(link.input) + len(link.answer) for link in links)


class Answering:
    """Made by `begun`; the answer is told and kept once."""

    def __init__(
        self, body: ResponsesBody, owner: bytes, store: ResponseStore, messages: list[Turn], items: list[Item]
    ) -> None:
        """`messages`: the whole conversation; `items`: those of this request's input."""
        self.id = new_id("resp")
        self.body = body
        self._owner = owner
        self._store = store
        self._messages = messages
        self._items = items
        self._final: bytes | None = None  # the response as JSON, once it has ended
        self._output: list[Item] = []

    @staticmethod
    async def begun(body: ResponsesBody, owner: bytes, store: ResponseStore, most: int) -> Answering:
        """`most`: bytes of the responses that are continued. Raises InvalidRequest, NotReady."""
        earlier = await _earlier(body.previous_response_id, owner, store, most)
        count = 1 if isinstance(body.input, str) else len(body.input)
        own = await off_loop(count * _ITEM_COST, lambda: body.items)
        references = [item["id"] for item in own if item["type"] == "item_reference"]
        referred = await store.with_items(owner, references)

        def joined() -> tuple[list[Turn], list[Item]]:
            stored = {item["id"]: item for item in conversation(referred)}
            items = resolved(own, stored.get)
            messages = turns(body.instructions, [*conversation(earlier), *items])
            if not messages:
                raise InvalidRequest("input: it has no items, and nothing was said before", param="input")
            return messages, items

        size = count * _ITEM_COST + size_of(earlier) + size_of(referred)
        return Answering(body, owner, store, *await off_loop(size, joined))

    @property
    def chat(self) -> Chat:
        """What the prompt is made of."""
        return Chat.of(self._messages, {"add_generation_prompt": True, "variables": self.body.variables})

    def asked(self, body: ResponsesBody) -> Asked:
        """See `Translation`."""
        tokens = body.max_output_tokens
        params = body.drawn(tokens or MAX_COUNT, top_logprobs=(body.top_logprobs or 0) if body.scored else 0)
        return Asked(
            [Prompt(self.chat, "input", False)],
            params,
            TextOptions(
                include_stop=body.include_stop_str_in_output,
                skip_special_tokens=body.skip_special_tokens,
                spaces_between_special_tokens=False,
                min_tokens=params.min_new_tokens,
            ),
            FieldNames("n", None if tokens is None else "max_output_tokens", subject="input"),
            body.model,
            tokens,
            seed=body.wrapped_seed,
            stop_texts=body.stops,
            stop_tokens=body.stop_token_ids or (),
            bad_texts=body.bad_texts,
            shows_prompt=False,
            drops_oldest=body.truncation == "auto",
            dialogue=body.dialogue,
            constraint=body.constraint,
        )

    async def reply(self, revision: Revision, body: ResponsesBody, jobs: Sequence[AdmittedJob]) -> ResponsesReply:
        """See `Translation`."""
        size = len(body.instructions or "") + len(body.tools or ()) * _TOOL_COST
        shape = await off_loop(size, ResponseShape, self.id, revision.model_name, body)
        return ResponsesReply(self, revision, shape, jobs[0])

    def ended(self, final: bytes, output: list[Item]) -> bytes:
        """The response as JSON, now that it doesn't change any more."""
        self._final, self._output = final, output
        return final

    async def keep(self) -> None:
        """See `Translation.before_end`. What can't be kept was answered all the same."""
        if self._final is None or not self.body.stored or not self._store.on:
            return
        size = len(self._items) * _ITEM_COST + sum(len(str(turn["content"] or "")) for turn in self._messages)
        given = await off_loop(size, json_in_parts, self._items)
        ids = [item["id"] for item in (*self._items, *self._output)]
        try:
            await self._store.put(self._owner, Kept(self.id, self.body.previous_response_id, self._final, given, ids))
        except NotReady as failed:
            log.warning("%s is not kept: %s", self.id, failed.message)


class ResponsesReply:
    """See `Reply`."""

    def __init__(self, answering: Answering, revision: Revision, shape: ResponseShape, job: AdmittedJob) -> None:
        self._exchange = answering
        self._tokenizer = revision.tokenizer
        self._shape = shape
        self._job = job

    def whole(self, pending: Pending) -> Any:
        """See `Reply`; JSON that is made."""
        reader = self._reader(pending)
        for _ in reader.end():
            pass
        return msgspec.Raw(self.final(reader, pending))

    def frames(self, pending: Pending) -> ResponseFrames:
        """See `Reply`."""
        return ResponseFrames(self, self._shape, self._reader(pending), pending)

    def final(self, reader: SequenceReader, pending: Pending, error: LightllmdError | None = None) -> bytes:
        """The response at its end, however that came."""
        status = "failed" if error is not None else status_of(reader)
        told = usage(pending.entries[0], reader.reasoning)
        output = reader.output.broken_off()
        shown = failure(error) if error is not None else None
        return self._exchange.ended(self._shape.json(status, output, told, shown), output)

    def _reader(self, pending: Pending) -> SequenceReader:
        body, branch = self._exchange.body, pending.entries[0].branches[0]
        shown = token_logprobs(self._tokenizer, body.top_logprobs or 0) if body.scored else None
        return SequenceReader(branch, self._job.parsers, summaries=body.reasoning.summarised, shown=shown)


class ResponseFrames(Frames):
    """The events of a stream. The first ones wait for the first token, so that a refusal keeps its own status."""

    def __init__(self, reply: ResponsesReply, shape: ResponseShape, reader: SequenceReader, pending: Pending) -> None:
        self._reply = reply
        self._shape = shape
        self._reader = reader
        self._pending = pending
        self._frames = EventWriter()
        self._begun = False

    def take(self) -> bytes:
        frames = b"".join(map(self._frames.frame, self._reader.advance())) if self._begun else b""
        if not self._begun and self._reader.branch.ids:
            frames = self._begin() + b"".join(map(self._frames.frame, self._reader.advance()))
        return frames

    def end(self) -> bytes:
        error: LightllmdError | None = None
        if self._reader.branch.finish == "abort":
            error = self._pending.error or RequestFailed("the answer was broken off")
            return self.error(error)
        head = b"" if self._begun else self._begin()
        closing = b"".join(map(self._frames.frame, self._reader.end()))
        final = self._reply.final(self._reader, self._pending)
        return head + closing + self._frames.response(f"response.{status_of(self._reader)}", final)

    def error(self, error: LightllmdError) -> bytes:
        """Both events, since clients look at the one or at the other; the second only where a response began."""
        told = self._frames.error(error)
        if self._begun:
            told += self._frames.response("response.failed", self._reply.final(self._reader, self._pending, error))
        return told

    def _begin(self) -> bytes:
        self._begun = True
        response = self._shape.json("in_progress")
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._frames.response(kind, response) for kind in kinds)


def error_frame(error: LightllmdError) -> bytes:
    """The end of a stream without a response."""
    return EventWriter().error(error)


def status_of(reader: SequenceReader) -> str:
    """Of a response whose sequence has ended."""
    return "completed" if reader.branch.finish == "stop" else "incomplete"


async def _earlier(previous: str | None, owner: bytes, store: ResponseStore, most: int) -> list[StoredResponse]:
    if previous is None:
        return []
    field = "previous_response_id"
    if not store.on:
        raise InvalidRequest(
            f"{field}: this server keeps no responses ([http] stored_responses = 0)",
            param=field,
            code="unsupported_parameter",
        )
    try:
        links = await store.chain(owner, previous, most)
    except OverflowError as size:
        raise InvalidRequest(
            f"{field}: the conversation up to there has {size} bytes, more than {most}", param=field
        ) from None
    if not links:
        raise InvalidRequest(
            f"Previous response with id '{previous}' not found.", param=field, code="previous_response_not_found"
        )
    if (gone := links[0].previous) is not None:
        raise InvalidRequest(
            f"{field}: the response {gone!r}, with which this conversation began or went on, is not kept any more",
            param=field,
            code="previous_response_not_found",
        )
    return links
