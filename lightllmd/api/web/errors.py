"""What a client is told when something is wrong: ``{"message": …}`` on native routes, OpenAI's envelope elsewhere."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError
from starlette.responses import Response

from lightllmd.errors import (
    BodyTooLarge,
    ClientClosed,
    DeadlineExceeded,
    InvalidRequest,
    LightllmdError,
    NotFound,
    NotReady,
    QueueFull,
    Unauthorized,
)

OPENAI_PATHS = ("/v1/", "/tokenize", "/detokenize")  # of routes that speak OpenAI's dialect
_SHOWN = 80  # characters of a refused value that a message repeats
_MOST_FAULTS = 8  # in one message
_CLOSE = 0.81  # difflib's ratio; a little less makes max_tokens of min_tokens
# What servers call the same thing. The spelling of such a name is near to that of others which mean something else.
_SAME_MEANING = (
    frozenset({"max_new_tokens", "max_tokens", "max_completion_tokens", "max_output_tokens", "max_length"}),
    frozenset({"min_new_tokens", "min_tokens", "min_length"}),
    frozenset({"stop_sequences", "stop", "stop_token_ids", "stop_words", "stop_strings"}),
    frozenset({"repetition_penalty", "repeat_penalty"}),
    frozenset({"logit_bias", "logits_bias", "token_bias"}),
    frozenset({"add_spaces_between_special_tokens", "spaces_between_special_tokens"}),
)
_TYPE_WORDS = {"model_type": "should be an object", "tuple_type": "should be an array"}

_OPENAI_TYPES: dict[type[LightllmdError], str] = {
    InvalidRequest: "invalid_request_error",
    BodyTooLarge: "invalid_request_error",
    NotFound: "not_found_error",
    Unauthorized: "authentication_error",
    QueueFull: "rate_limit_error",
    NotReady: "service_unavailable_error",
    DeadlineExceeded: "timeout_error",
    ClientClosed: "client_closed_error",
}


class MethodNotAllowed(InvalidRequest):
    status = 405


def openai_error(error: LightllmdError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": _OPENAI_TYPES.get(type(error), "server_error" if error.status >= 500 else "invalid_request_error"),
            "param": error.parameters.get("param"),
            "code": error.parameters.get("code"),
        }
    }


def error_body(error: LightllmdError, path: str) -> dict[str, Any]:
    """In the dialect of `path`."""
    return openai_error(error) if path.startswith(OPENAI_PATHS) else {"message": error.message}


def error_response(error: LightllmdError, path: str) -> Response:
    body = error_body(error, path)
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(msgspec.json.encode(body), error.status, headers, media_type="application/json")


def _brief(name: str) -> str:
    """A client's name for a field, which may be as long as its body."""
    return name if len(name) <= _SHOWN else name[: _SHOWN - 1] + "…"


def shown(value: Any) -> str:
    """A refused value as a message may repeat it."""
    if isinstance(value, int) and value.bit_length() > _SHOWN * 3:
        return "an integer of many digits"
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxlist, brief.maxdict = 3, 4, 4
    brief.maxstring = brief.maxlong = brief.maxother = _SHOWN
    return brief.repr(value)


def contradiction(field: str, words: str) -> PydanticCustomError:
    """For a model's validator to raise where `field` is wrong because of what another one says. `words` say it all."""
    return PydanticCustomError("contradiction", "{words}", {"words": words, "field": field})


@contextmanager
def naming(field: str) -> Iterator[None]:
    """A request that is refused inside is refused because of `field`, unless it is said already of which."""
    try:
        yield
    except InvalidRequest as refusal:
        refusal.parameters.setdefault("param", field)
        raise


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or the list of what is known."""
    known = sorted(known)
    if (same := next((group for group in _SAME_MEANING if name in group), None)) is not None:
        close = sorted(same.intersection(known))
    else:
        close = difflib.get_close_matches(name, known, n=1, cutoff=_CLOSE)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


def from_validation(failure: ValidationError, known: dict[str, Iterable[str]]) -> InvalidRequest:
    """One message that names each field, its value and the bound.

    `known` has the field names of each object by its dotted path without indices ("" is the body).
    """
    faults: dict[str, _Fault] = {}  # by the field that is wrong, so that of a union one alternative speaks
    for problem in failure.errors(include_url=False):
        fault = _Fault.of(problem, known)
        if fault.field not in faults or fault.closeness > faults[fault.field].closeness:
            faults[fault.field] = fault
    shown_faults = list(faults.values())[:_MOST_FAULTS]
    return InvalidRequest("; ".join(fault.message for fault in shown_faults), param=shown_faults[0].path or None)


@dataclass(frozen=True)
class _Fault:
    field: str  # dotted path up to the first alternative of a union
    path: str  # dotted path of the value that is wrong
    message: str
    closeness: tuple[bool, int]  # how near this alternative of a union came to the value

    @classmethod
    def of(cls, problem: ErrorDetails, known: dict[str, Iterable[str]]) -> _Fault:
        kind, place = problem["type"], problem["loc"]
        path: list[str] = []
        names: list[str] = []  # the path without indices
        field = None
        for depth, part in enumerate(place):
            if isinstance(part, int):
                path.append(str(part))
            elif part in known.get(".".join(names), ()) or (kind == "extra_forbidden" and depth == len(place) - 1):
                path.append(_brief(part))
                names.append(_brief(part))
            else:  # pydantic's name for an alternative of a union
                field = field or ".".join(path)
        where = ".".join(path)
        if kind == "contradiction":
            path.append(problem["ctx"]["field"])
        words = _words(problem, known.get(".".join(names[:-1]), ()))
        closeness = (not kind.endswith("_type"), len(path))
        return cls(
            ".".join(path) if field is None else field,
            ".".join(path),
            f"{where}: {words}" if where else words,
            closeness,
        )


def _words(problem: ErrorDetails, known: Iterable[str]) -> str:
    kind = problem["type"]
    if kind == "extra_forbidden":
        return f"unknown field; {nearest(_brief(str(problem['loc'][-1])), known)}"
    if kind == "missing":
        return "required"
    if kind == "contradiction":
        return problem["msg"]
    if kind == "value_error":  # from a validator of ours, which says it all
        return problem["msg"].removeprefix("Value error, ")
    words = _TYPE_WORDS.get(kind) or problem["msg"].replace("Input should be", "should be")
    return f"{words}; got {shown(problem['input'])}"
