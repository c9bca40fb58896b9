"""Whether a value is valid under a schema, and whether what is generated of one can be valid under another."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

from lightllmd.grammar.ebnf.expressions import matches
from lightllmd.grammar.ebnf.reading import Alternative, SchemaDocument, Subschema, literals, types, written_types
from lightllmd.grammar.ebnf.shapes import ObjectShape, arrays, numbers, objects, text_shape

_MAX_DEPTH = 6  # of properties and items that are looked into for a difference


def same(one: Any, other: Any) -> bool:
    """Equal as JSON values: true is not 1, but 1 is 1.0."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def valid(document: SchemaDocument, value: Any, alternative: Alternative) -> bool:
    """Whether `value` is valid under an alternative. Raises InvalidRequest for a schema that can't be read."""
    kind = _kind(value)
    allowed, integers = types(alternative)
    if kind not in allowed or (kind == "number" and integers and value != int(value)):
        return False
    for schema, _ in alternative.views:
        if "enum" in schema and not any(same(value, one) for one in schema["enum"]):
            return False
        if "const" in schema and not same(value, schema["const"]):
            return False
    check = {"number": _number, "string": _string, "array": _array, "object": _object}.get(kind)
    if check is not None and not check(document, value, alternative):
        return False
    return not any(valid(document, value, other) for one in alternative.excluded for other in one.alternatives)


def _valid(document: SchemaDocument, value: Any, nodes: Sequence[Subschema]) -> bool:
    return any(valid(document, value, one) for one in document.alternatives(nodes))


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return kinds[type(value)]


def _number(document: SchemaDocument, value: Any, alternative: Alternative) -> bool:
    shape = numbers(alternative)
    number, interval = Decimal(repr(value)), shape.interval
    step = shape.divisor if shape.step is None else shape.step
    inside = not interval.both(type(interval)(number, number)).empty
    return inside and (step == 1 or Fraction(number) % Fraction(step) == 0)


def _string(document: SchemaDocument, value: str, alternative: Alternative) -> bool:
    shape = text_shape(alternative)
    size = len(value)
    return (
        shape.least <= size
        and (shape.most is None or size <= shape.most)
        and all(matches(text, value) for text, _ in shape.texts)
    )


def _array(document: SchemaDocument, value: list[Any], alternative: Alternative) -> bool:
    shape = arrays(alternative)
    if len(value) < shape.least or (shape.most is not None and len(value) > shape.most):
        return False
    if shape.unique_path and any(same(one, other) for at, one in enumerate(value) for other in value[:at]):
        return False
    if (contained := shape.contains) is not None:
        count = sum(_valid(document, one, [contained.schema]) for one in value)
        if count < contained.least or (contained.most is not None and count > contained.most):
            return False
    nodes = [*shape.prefix[: len(value)], *[shape.rest] * (len(value) - len(shape.prefix))]
    return all(_valid(document, one, own) for one, own in zip(value, nodes, strict=True))


def _object(document: SchemaDocument, value: dict[str, Any], alternative: Alternative) -> bool:
    shape = objects(alternative)
    if not shape.required <= value.keys() or len(value) < shape.least:
        return False
    if shape.most is not None and len(value) > shape.most:
        return False
    for name, one in value.items():
        if shape.names and not _valid(document, name, shape.names):
            return False
        nodes = shape.declared.get(name)
        if nodes is None:
            nodes = next((own for text, own, _ in shape.by_pattern if matches(text, name)), shape.others)
        if not _valid(document, one, nodes):
            return False
    return True


# --- disjoint ---------------------------------------------------------------------------------------------------------


def disjoint(document: SchemaDocument, written: Alternative, other: Alternative, depth: int = 0) -> bool:
    """Whether nothing that is generated for the first is valid under the second. False: that is not proved."""
    if (values := literals(written)) is not None:
        return not any(valid(document, one, other) for one in values)
    if (values := literals(other)) is not None:
        views = Alternative(written.views)  # what is excluded of it is not proved yet
        return not any(valid(document, one, views) for one in values)
    common = written_types(written) & types(other)[0]
    apart = {"number": _numbers_apart, "string": _strings_apart, "array": _arrays_apart, "object": _objects_apart}
    return all(kind in apart and apart[kind](document, written, other, depth) for kind in common)


def _numbers_apart(document: SchemaDocument, written: Alternative, other: Alternative, depth: int) -> bool:
    both = numbers(written).interval.both(numbers(other).interval)
    if numbers(written).integers or numbers(other).integers:
        least, most = both.integers
        return least is not None and most is not None and least > most
    return both.empty


def _strings_apart(document: SchemaDocument, written: Alternative, other: Alternative, depth: int) -> bool:
    one, two = text_shape(written), text_shape(other)
    return (one.most is not None and two.least > one.most) or (two.most is not None and one.least > two.most)


def _arrays_apart(document: SchemaDocument, written: Alternative, other: Alternative, depth: int) -> bool:
    one, two = arrays(written), arrays(other)
    if (one.most is not None and two.least > one.most) or (two.most is not None and one.least > two.most):
        return True
    for index in range(min(max(one.least, two.least), 16)):
        own = one.prefix[index] if index < len(one.prefix) else one.rest
        others = two.prefix[index] if index < len(two.prefix) else two.rest
        if _nodes_apart(document, own, others, depth):
            return True
    return False


def _objects_apart(document: SchemaDocument, written: Alternative, other: Alternative, depth: int) -> bool:
    one, two = _object_shape(document, written), _object_shape(document, other)
    for name in two.required.difference(one.declared):
        if not one.open and not any(matches(text, name) for text, _, _ in one.by_pattern):
            return True
    for name in one.declared:
        if name in one.required or name in two.required:
            theirs = two.declared.get(name)
            if theirs is None:
                theirs = next((own for text, own, _ in two.by_pattern if matches(text, name)), two.others)
            if _nodes_apart(document, one.declared[name], theirs, depth):
                return True
    return False


def _object_shape(document: SchemaDocument, alternative: Alternative) -> ObjectShape:
    known = document.object_shapes
    kept = known.get(id(alternative))
    if kept is None:
        kept = known[id(alternative)] = alternative, objects(alternative)
    shape: ObjectShape = kept[1]
    return shape


def _nodes_apart(
    document: SchemaDocument, written: Sequence[Subschema], other: Sequence[Subschema], depth: int
) -> bool:
    if depth >= _MAX_DEPTH:
        return False
    theirs = document.alternatives(other)
    return all(disjoint(document, mine, one, depth + 1) for mine in document.alternatives(written) for one in theirs)
