"""How a fault of a field is told: the field by its dotted path, the value that was given, and the bound."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from lightllmd.errors import InvalidRequest

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


def _short(name: str) -> str:
    """A client's name for a field, which may be as long as its body."""
    return name if len(name) <= _SHOWN else name[: _SHOWN - 1] + "…"


def shown(value: Any) -> str:
    """A refused value as a message may repeat it."""
    if isinstance(value, int) and value.bit_length() > _SHOWN * 3:
        return "an integer of many digits"
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxdict = 3, 4, 4
    short.maxstring = short.maxlong = short.maxother = _SHOWN
    return short.repr(value)


def contradiction(field: str, words: str) -> PydanticCustomError:
    """For a model's validator to raise where `field` is wrong because of what another one says. `words` say it all."""
    return PydanticCustomError("contradiction", "{words}", {"words": words, "field": field})


@contextmanager
def naming(field: str | None) -> Iterator[None]:
    """A request that is refused inside is refused because of `field`, unless it is said already of which."""
    try:
        yield
    except InvalidRequest as refusal:
        if field is not None:
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


def from_validation(failure: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    """One message that names each field of `model`, its value and the bound."""
    known = _field_names(model)
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
                path.append(_short(part))
                names.append(_short(part))
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
        return f"unknown field; {nearest(_short(str(problem['loc'][-1])), known)}"
    if kind == "missing":
        return "required"
    if kind == "contradiction":
        return problem["msg"]
    if kind == "value_error":  # from a validator of ours, which says it all
        return problem["msg"].removeprefix("Value error, ")
    words = _TYPE_WORDS.get(kind) or problem["msg"].replace("Input should be", "should be")
    return f"{words}; got {shown(problem['input'])}"


@cache
def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """By the names that they have in a body."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _field_names(model: type[BaseModel], path: str = "") -> dict[str, Iterable[str]]:
    """The field names of `model` and of the models inside it, by dotted path without indices; "" is `model`'s own."""
    fields = fields_of(model)
    known: dict[str, Iterable[str]] = {path: list(fields)}
    for name, field in fields.items():
        for inner in _models_in(field.annotation):
            for place, names in _field_names(inner, f"{path}.{name}" if path else name).items():
                known[place] = [*dict.fromkeys([*known.get(place, ()), *names])]  # of each alternative of a union
    return known


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
