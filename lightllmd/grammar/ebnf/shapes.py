"""What the views of an alternative say together about values of one type."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from lightllmd.grammar.ebnf.expressions import Expression, matches
from lightllmd.grammar.ebnf.numbers import MAX_BOUND, Interval
from lightllmd.grammar.ebnf.reading import Alternative, Subschema, counts, mapping, refusal, strings, types
from lightllmd.grammar.ebnf.regex import RegexInvalid, searched
from lightllmd.grammar.ebnf.strings import REFUSED_FORMATS, format_text

MAX_SIZE = 100_000  # of a string or array; longer ones are never written
MAX_NAME = 256  # characters of a property's name


# --- numbers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NumberShape:
    """Numbers."""

    interval: Interval
    integers: bool
    divisor: int = 1  # that all are multiples of, which are integers then
    divisor_path: str = ""  # of that, or of `step`
    step: Decimal | None = None  # no integer: that all are multiples of, which may be fractions


def numbers(alternative: Alternative) -> NumberShape:
    """Raises InvalidRequest."""
    interval = Interval()
    for keyword, low, strict in (
        ("minimum", True, False),
        ("exclusiveMinimum", True, True),
        ("maximum", False, False),
        ("exclusiveMaximum", False, True),
    ):
        for value, path in alternative.of(keyword):
            bound = _decimal(value, path)
            if abs(bound) > MAX_BOUND:
                if low == (bound > 0):
                    raise refusal(path, f"numbers beyond {MAX_BOUND:.0e} can't be enforced; got {value!r:.80}")
                continue
            own = Interval(low=bound, low_excluded=strict) if low else Interval(high=bound, high_excluded=strict)
            interval = interval.both(own)
    _, integers = types(alternative)
    step, where = Fraction(0), ""
    for value, path in alternative.of("multipleOf"):
        one = _decimal(value, path)
        if one <= 0:
            raise refusal(path, f"should be above 0; got {value!r:.80}")
        step, where = _common(step, Fraction(one)), path
    if not step:
        return NumberShape(interval, integers)
    if integers or step.denominator == 1:
        return NumberShape(interval, True, step.numerator, where)
    return NumberShape(interval, False, 1, where, _exact(step))


def _common(one: Fraction, other: Fraction) -> Fraction:
    """The least multiple of both; 0: of the other."""
    if not one:
        return other
    return Fraction(math.lcm(one.numerator, other.numerator), math.gcd(one.denominator, other.denominator))


def _exact(value: Fraction) -> Decimal:
    """Of a fraction that is one of a power of ten."""
    places = 0
    while value.denominator > 1:
        value, places = value * 10, places + 1
    return Decimal(value.numerator).scaleb(-places)


def _decimal(value: Any, path: str) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refusal(path, f"should be a number; got {value!r:.80}")
    return Decimal(repr(value))


# --- strings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StringShape:
    """Strings."""

    least: int
    most: int | None
    texts: tuple[tuple[Expression, str], ...] = ()  # all of which it matches, each with the path of what says so


def text_shape(alternative: Alternative) -> StringShape:
    """Raises InvalidRequest."""
    least, most = counts(alternative, "minLength", "maxLength")
    texts: dict[Expression, str] = {}
    for value, path in alternative.of("pattern"):
        texts.setdefault(pattern(value, path), path)
    patterned = bool(texts)
    for value, path in alternative.of("format"):
        if not isinstance(value, str):
            raise refusal(path, f"should be a string; got {value!r:.80}")
        if patterned:
            continue  # what JSON Schema allows: an annotation; clients write the pattern of the format beside it
        if value in REFUSED_FORMATS:
            raise refusal(path, f"can't be enforced; got {value!r}")
        known = format_text(value)
        if known is not None:
            texts.setdefault(known, path)
    return StringShape(least, most, tuple(texts.items()))


def pattern(value: Any, path: str) -> Expression:
    """Of the texts in which a pattern is found. Raises InvalidRequest."""
    if not isinstance(value, str):
        raise refusal(path, f"should be a string; got {value!r:.80}")
    try:
        return _searched(value)
    except RegexInvalid as fault:
        raise refusal(path, f"{fault}; got {value!r:.80}") from None


@lru_cache(256)
def _searched(value: str) -> Expression:
    return searched(value)


# --- arrays -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contained:
    """How many items are valid under a schema."""

    schema: Subschema
    least: int
    most: int | None


@dataclass(frozen=True)
class ArrayShape:
    """Arrays."""

    prefix: tuple[tuple[Subschema, ...], ...]  # of each item all schemas
    rest: tuple[Subschema, ...]  # of each item behind
    open: bool  # whether there may be any behind
    least: int
    most: int | None
    unique_path: str | None  # of what says that no two items are equal
    contains: Contained | None


def arrays(alternative: Alternative) -> ArrayShape:
    """Raises InvalidRequest."""
    least, most = counts(alternative, "minItems", "maxItems")
    listed = [_items(schema, path) for schema, path in alternative.views]
    length = max((len(prefix) for prefix, _, _ in listed), default=0)
    prefix = tuple(
        tuple(one for own, rest, _ in listed for one in ([own[index]] if index < len(own) else rest))
        for index in range(length)
    )
    rest = tuple(one for _, own, _ in listed for one in own)
    said = any(told for _, _, told in listed)
    unique = next((path for value, path in alternative.of("uniqueItems") if _switch(value, path)), None)
    for value, path in alternative.of("unevaluatedItems"):
        if value is not False or len(alternative.views) > 1:
            raise refusal(path, "can be enforced as false only, in a schema that nothing is combined with")
    return ArrayShape(prefix, rest, said or not length or least > length, least, most, unique, _contained(alternative))


def _contained(alternative: Alternative) -> Contained | None:
    found = None
    for schema, path in alternative.views:
        if "contains" not in schema:
            continue  # minContains and maxContains say nothing then
        least, most = counts(Alternative((Subschema(schema, path),)), "minContains", "maxContains")
        if "minContains" not in schema:
            least = 1
        if found is not None:
            raise refusal(f"{path}.contains", f"can't be enforced together with {found.schema.path}")
        found = Contained(Subschema(schema["contains"], f"{path}.contains"), least, most)
    return found


def _items(schema: dict[str, Any], path: str) -> tuple[list[Subschema], list[Subschema], bool]:
    """The items that are listed, what all others are, and whether anything is said of these."""
    listed, others, name = schema.get("prefixItems"), schema.get("items"), "items"
    where = f"{path}.prefixItems"
    if isinstance(others, list) and listed is None:  # before draft 2020-12
        listed, others, where, name = others, schema.get("additionalItems"), f"{path}.items", "additionalItems"
    if listed is not None and not isinstance(listed, list):
        raise refusal(where, "should be a list of schemas")
    prefix = [Subschema(one, f"{where}.{number}") for number, one in enumerate(listed or ())]
    if others is None and schema.get("unevaluatedItems") is False:
        others, name = False, "unevaluatedItems"
    return prefix, [] if others is None else [Subschema(others, f"{path}.{name}")], others is not None


def _switch(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise refusal(path, f"should be true or false; got {value!r:.80}")
    return value


# --- objects ----------------------------------------------------------------------------------------------------------


@dataclass
class ObjectShape:
    """Objects."""

    declared: dict[str, list[Subschema]] = field(default_factory=dict)  # all schemas of each named property, in order
    required: set[str] = field(default_factory=set)
    others: list[Subschema] = field(default_factory=list)  # all schemas of any other property
    open: bool = False  # whether there may be others
    others_path: str = ""  # of what says so
    by_pattern: list[tuple[Expression, list[Subschema], str]] = field(default_factory=list)
    names: list[Subschema] = field(default_factory=list)  # what the names themselves are
    least: int = 0
    most: int | None = None


def objects(alternative: Alternative) -> ObjectShape:
    """Each property with all that the views say of it, be it by name, by pattern or as one of the others. Other
    properties are generated where that is asked for, or if none is declared. Raises InvalidRequest."""
    shape = ObjectShape(required=strings(alternative, "required"))
    shape.least, shape.most = counts(alternative, "minProperties", "maxProperties")
    views = [_View(schema, path) for schema, path in alternative.views]
    names = dict.fromkeys(name for view in views for name in view.properties)
    names.update(dict.fromkeys(sorted(shape.required.difference(names))))
    for name in names:
        if len(name) > MAX_NAME:
            raise refusal(alternative.views[0].path, f"a name of {len(name)} characters, more than {MAX_NAME}")
    shape.declared = {name: [node for view in views for node in view.schemas_of(name)] for name in names}
    shape.others = [view.others for view in views if view.others is not None]
    told = [view for view in views if view.others is not None and view.others.schema is not False]
    closed = any(view.others is not None and view.others.schema is False for view in views)
    patterned = any(view.patterns for view in views)
    shape.open = not closed and (bool(told) or not (any(view.lists for view in views) or patterned))
    shape.others_path = told[0].others.path if told and told[0].others is not None else ""
    if patterned:
        shape.by_pattern = _by_pattern(views, shape)
    shape.names = [Subschema(value, path) for value, path in alternative.of("propertyNames")]
    for value, path in alternative.of("unevaluatedProperties"):
        if value is not False or alternative.origin != path.rpartition(".")[0]:
            raise refusal(path, "can be enforced as false only, in a schema that is not part of another")
        shape.open = shape.open and bool(told)
    return shape


class _View:
    """What one schema says of properties."""

    def __init__(self, schema: dict[str, Any], path: str) -> None:
        self.path = path
        self.lists = "properties" in schema  # be it none, as of a tool without parameters
        self.properties = {
            name: Subschema(one, f"{path}.properties.{name}")
            for name, one in mapping(schema.get("properties", {}), f"{path}.properties").items()
        }
        self.patterns = [
            (pattern(one, f"{path}.patternProperties"), Subschema(inner, f"{path}.patternProperties.{one}"))
            for one, inner in mapping(schema.get("patternProperties", {}), f"{path}.patternProperties").items()
        ]
        given = schema.get("additionalProperties")
        self.others = None if given is None else Subschema(given, f"{path}.additionalProperties")

    def schemas_of(self, name: str) -> Iterable[Subschema]:
        """All that counts for a property of this name."""
        found = [node for text, node in self.patterns if matches(text, name)]
        if name in self.properties:
            found.append(self.properties[name])
        return found or ([] if self.others is None else [self.others])


def _by_pattern(views: list[_View], shape: ObjectShape) -> list[tuple[Expression, list[Subschema], str]]:
    """Properties whose names match a pattern. Which names match one and not another is not said by a grammar."""
    patterns = [(text, node, view) for view in views for text, node in view.patterns]
    text, node, _ = patterns[0]
    if any(other != text for other, _, _ in patterns):
        raise refusal(node.path, "names that match one of several patterns can't be told apart")
    if any(view.others is not None and not isinstance(view.others.schema, bool) for view in views):
        raise refusal(
            node.path, "other names can't be told apart from those that match; set additionalProperties to false"
        )
    for name in shape.declared:
        if matches(text, name):
            raise refusal(node.path, f"the name of the property {name!r} matches, too")
    owners = [view for _, _, view in patterns]
    nodes = [one for _, one, _ in patterns]
    nodes += [view.others for view in views if view.others is not None and view not in owners]
    shape.open = False
    return [(text, nodes, node.path)]
