"""From the bytes of a body to a checked model: size, JSON, fields, bounds. Nothing here reaches the engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.requests import Request

from lightllmd.api.web.ignored_fields import IgnoredFields
from lightllmd.config.parameters import HttpSettings
from lightllmd.errors import BodyTooLarge, ClientClosed, InvalidRequest
from lightllmd.http.exchange import release_body
from lightllmd.requests.faults import from_validation
from lightllmd.requests.fields import MAX_FIELDS, Body

MAX_DEPTH = 64  # of nested JSON arrays and objects
MAX_CONTAINERS = 1 << 16  # objects and arrays in all
_REFERENCE = "#/components/schemas/{model}"
STREAMS = "x-streams"  # key of a fragment, which the document takes out again
Streams = Literal["always", "asked", "never"]
_INLINE = 8 << 10  # bytes; a larger body is decoded in another process so that streams go on

Model = TypeVar("Model", bound=Body)


async def read(request: Request, limit: int) -> bytes:
    """The body, at most `limit` bytes whatever Content-Length says. Raises BodyTooLarge, ClientClosed."""
    too_large = BodyTooLarge(f"the body is larger than max_body_bytes = {limit}")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientClosed("the client closed the connection before its body was complete")
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def decode(raw: bytes, model: type[Model], ignored: set[str] | None = None) -> Model:
    """Puts the names of fields that were passed over into `ignored`; None: unknown fields are refused.

    Raises InvalidRequest with every fault that was found."""
    if not raw.strip():
        raise InvalidRequest("the body is empty; a JSON object is expected")
    try:
        body = msgspec.json.decode(raw)
    except UnicodeDecodeError as failure:
        raise InvalidRequest(f"the body is not UTF-8: {failure.reason} at byte {failure.start}") from None
    except RecursionError:
        raise InvalidRequest(f"the body nests deeper than {MAX_DEPTH} levels") from None
    except msgspec.MsgspecError as failure:
        raise InvalidRequest(f"the body is not JSON: {failure}") from None
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object; got {_kind(body)}")
    _check_shape(body)
    try:
        return model.model_validate(model.prepare(body), context=ignored)
    except ValidationError as failure:
        raise from_validation(failure, model) from None


def decode_noting(raw: bytes, model: type[Model], noting: bool) -> tuple[Model, set[str]]:
    """With the names of the fields that were passed over. Without `noting` unknown fields are refused."""
    ignored: set[str] = set()
    return decode(raw, model, ignored if noting else None), ignored


Decoder = Callable[[bytes, type[Any], bool], Awaitable[tuple[Any, set[str]]]]


async def parse(
    request: Request,
    model: type[Model],
    limit: int,
    decode_large: Decoder,
    told: IgnoredFields | None = None,
) -> Model:
    """`told` hears of unknown fields that were passed over; None: they are refused. `decode_large` does for large
    bodies what `decode_noting` does for others."""
    noting = told is not None
    try:
        raw = await read(request, limit)
        if len(raw) > _INLINE:
            body, ignored = await decode_large(raw, model, noting)
        else:
            body, ignored = decode_noting(raw, model, noting)
    finally:
        release_body(request.scope)
    if told is not None and ignored:
        told.note(request.scope, ignored)
    return body


def parser(http: HttpSettings, decode_large: Decoder) -> Callable[[Request, type[Model]], Awaitable[Model]]:
    """`parse` as the configuration has it."""
    told = IgnoredFields() if http.unknown_fields == "ignore" else None
    return partial(parse, limit=http.max_body_bytes, decode_large=decode_large, told=told)


def documented(model: type[Body], *, streams: Streams | None = None) -> dict[str, Any]:
    """The OpenAPI fragment of a route that reads its body itself; `schemas` has what it refers to. `streams`: whether
    it answers with events; None: as a field `stream` of the body asks."""
    reference = {"$ref": _REFERENCE.format(model=model.__name__)}
    body = {"required": True, "content": {"application/json": {"schema": reference}}}
    asked: Streams = "asked" if "stream" in model.model_fields else "never"
    return {"requestBody": body, STREAMS: streams or asked}


def body_name(fragment: Mapping[str, Any] | None) -> str | None:
    """The name of the model in a fragment of `documented`."""
    if not fragment or "requestBody" not in fragment:
        return None
    reference: str = fragment["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    return reference.rpartition("/")[2]


def schemas(models: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """OpenAPI's components for `models` and the models inside them."""
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REFERENCE)
    return definitions["$defs"]


def _check_shape(body: Any) -> None:
    level, containers = [body], 0
    for _ in range(MAX_DEPTH):
        containers += len(level)
        if containers > MAX_CONTAINERS:
            raise InvalidRequest(f"the body has more than {MAX_CONTAINERS} objects and arrays")
        for value in level:
            if isinstance(value, dict) and len(value) > MAX_FIELDS:
                raise InvalidRequest(f"an object in the body has {len(value)} fields, more than {MAX_FIELDS}")
        level = [
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise InvalidRequest(f"the body nests deeper than {MAX_DEPTH} levels")


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array"}
    return names[type(value)]
