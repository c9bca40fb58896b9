"""A JSON schema (draft 2020-12, and what is left of its forerunners) as alternatives: each a list of views, schemas
without applicators that all count, and what is excluded from it.

References, ``allOf``, ``anyOf``, ``oneOf``, ``not``, ``if`` and the dependencies between properties are resolved here.
What may not be true as well (the other branches of a ``oneOf``) is kept beside each alternative; who makes a grammar of
it has to prove that it can't be (`overlap.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from urllib.parse import unquote

from lightllmd.errors import InvalidRequest

MAX_DEPTH = 64  # of arrays and objects within one another
MAX_STEPS = 20_000  # schemas that are read, one that several places refer to each time
MAX_ALTERNATIVES = 512  # of one schema

TYPES = ("null", "boolean", "number", "string", "array", "object")
# Keywords that say something of values of one type only.
BY_TYPE: dict[str, tuple[str, ...]] = {
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "array": (
        *("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "unevaluatedItems"),
        *("contains", "minContains", "maxContains"),
    ),
    "object": (
        *("properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
        *("minProperties", "maxProperties", "unevaluatedProperties"),
    ),
}
_ASSERTIONS = frozenset({"type", "enum", "const", *(name for names in BY_TYPE.values() for name in names)})
_APPLICATORS = ("$ref", "allOf", "anyOf", "oneOf", "not", "if", "dependentRequired", "dependentSchemas", "dependencies")
_REFUSED = {
    "$dynamicRef": "only $ref within the schema can be followed",
    "$recursiveRef": "only $ref within the schema can be followed",
    "disallow": "draft 3; use not",
    "divisibleBy": "draft 3; use multipleOf",
    "extends": "draft 3; use allOf",
}


class Subschema(NamedTuple):
    """A schema, and where it stands."""

    schema: Any
    path: str


@dataclass(frozen=True)
class Exclusion:
    """A schema that may not be valid as well."""

    path: str  # of the keyword that says so
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True)
class Alternative:
    """All of the views are valid, of each exclusion none of the alternatives."""

    views: tuple[Subschema, ...]
    excluded: tuple[Exclusion, ...] = ()
    origin: str = ""  # the path of the one schema that all of it is from, where there is one

    def also(self, other: Alternative) -> Alternative:
        """Both at once."""
        views = {view.path: view for view in (*self.views, *other.views)}
        return Alternative(tuple(views.values()), self.excluded + other.excluded)

    def of(self, keyword: str) -> Iterable[tuple[Any, str]]:
        """What the views say by a keyword, and where."""
        for schema, path in self.views:
            if keyword in schema:
                yield schema[keyword], f"{path}.{keyword}"


class SchemaDocument:
    """One schema with all that it refers to. Every method raises InvalidRequest, which names the path."""

    def __init__(self, schema: Any, field: str) -> None:
        _check_depth(schema, field)
        self.root = Subschema(schema, field)
        self._steps = 0
        # What is said of objects, by the alternative, which lives as long: many are held against many.
        self.object_shapes: dict[int, Any] = {}
        self._known: dict[tuple[str, ...], list[Alternative]] = {}  # by the paths of their schemas
        self._open: list[str] = []  # paths that are being read at one place of the instance

    def alternatives(self, nodes: Iterable[Subschema]) -> list[Alternative]:
        """Of what is valid under all of them."""
        nodes = [*nodes]
        key = tuple(node.path for node in nodes)
        if key not in self._known:
            self._known[key] = self._combinations(nodes)
        return self._known[key]

    def _combinations(self, nodes: list[Subschema]) -> list[Alternative]:
        found = self._product([self._read(node) for node in nodes], nodes[0].path if nodes else self.root.path)
        origin = self.resolved(nodes[0]).path if len(nodes) == 1 else ""
        return [replace(one, origin=origin) for one in found]

    def resolved(self, node: Subschema) -> Subschema:
        """What a schema that is nothing but a reference refers to."""
        for _ in range(MAX_DEPTH):
            if not isinstance(node.schema, dict) or "$ref" not in node.schema:
                break
            if any(name in node.schema for name in (*_ASSERTIONS, *_APPLICATORS, *_REFUSED) if name != "$ref"):
                break
            node = self.referred(node)
        return node

    def says(self, node: Subschema) -> bool:
        """Whether a schema is more than annotations."""
        if isinstance(node.schema, dict):
            return any(name in node.schema for name in (*_ASSERTIONS, *_APPLICATORS, *_REFUSED))
        return node.schema is not True

    # --- one schema -----------------------------------------------------------------------------------------------

    def _read(self, node: Subschema) -> list[Alternative]:
        schema, path = node
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise refusal(path, f"the schema takes more than {MAX_STEPS} steps to read")
        if isinstance(schema, bool):
            return [Alternative(())] if schema else []
        if not isinstance(schema, dict):
            raise refusal(path, "should be an object or a boolean")
        if path in self._open:
            raise refusal(path, "refers to itself without anything between")
        self._open.append(path)
        try:
            return self._combined(node)
        finally:
            self._open.pop()

    def _combined(self, node: Subschema) -> list[Alternative]:
        schema, path = node
        for name, why in _REFUSED.items():
            if name in schema:
                raise refusal(f"{path}.{name}", why)
        if not isinstance(schema.get("enum", []), list):
            raise refusal(f"{path}.enum", "should be a list")
        asserted = not _ASSERTIONS.isdisjoint(schema)
        parts = [[Alternative((node,) if asserted else ())]]
        for name in _APPLICATORS:
            if name in schema:
                parts += getattr(self, f"_{name.strip('$')}" if name != "if" else "_conditional")(node)
        return self._product(parts, path)

    def _product(self, parts: Iterable[list[Alternative]], path: str) -> list[Alternative]:
        product = [Alternative(())]
        for part in parts:
            if len(product) * len(part) > MAX_ALTERNATIVES:
                raise refusal(path, f"combines to more than {MAX_ALTERNATIVES} alternatives")
            product = [one.also(other) for one in product for other in part]
        return product

    # --- applicators: each gives parts, of all of which one alternative has to be valid ----------------------------

    def _ref(self, node: Subschema) -> list[list[Alternative]]:
        return [self._read(self.referred(node))]

    def referred(self, node: Subschema) -> Subschema:
        """What a $ref refers to."""
        reference, path = node.schema["$ref"], f"{node.path}.$ref"
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise refusal(path, f"only references within the schema (#, #/…) can be followed; got {reference!r:.80}")
        schema, place = self.root
        for part in reference.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            place = f"{place}.{name}"
            if isinstance(schema, dict) and name in schema:
                schema = schema[name]
            elif isinstance(schema, list) and name.isdecimal() and int(name) < len(schema):
                schema = schema[int(name)]
            else:
                raise refusal(path, f"there is no {reference:.80}")
        return Subschema(schema, place)

    def _allOf(self, node: Subschema) -> list[list[Alternative]]:  # noqa: N802
        return [self._read(one) for one in self._listed(node, "allOf")]

    def _anyOf(self, node: Subschema) -> list[list[Alternative]]:  # noqa: N802
        return [[one for branch in self._listed(node, "anyOf") for one in self._read(branch)]]

    def _oneOf(self, node: Subschema) -> list[list[Alternative]]:  # noqa: N802
        branches = [tuple(self._read(branch)) for branch in self._listed(node, "oneOf")]
        found = []
        for number, branch in enumerate(branches):
            others = [one for other in (*branches[:number], *branches[number + 1 :]) for one in other]
            exclusion = Exclusion(f"{node.path}.oneOf", tuple(others))
            found += [Alternative(one.views, (*one.excluded, exclusion)) for one in branch]
        return [found]

    def _not(self, node: Subschema) -> list[list[Alternative]]:
        inner = self._read(Subschema(node.schema["not"], f"{node.path}.not"))
        return [[Alternative((), (Exclusion(f"{node.path}.not", tuple(inner)),))]]

    def _conditional(self, node: Subschema) -> list[list[Alternative]]:
        schema, path = node
        condition = self._read(Subschema(schema["if"], f"{path}.if"))
        then = self._read(Subschema(schema.get("then", True), f"{path}.then"))
        otherwise = self._read(Subschema(schema.get("else", True), f"{path}.else"))
        without = Alternative((), (Exclusion(f"{path}.if", tuple(condition)),))
        return [[*self._product([condition, then], path), *(one.also(without) for one in otherwise)]]

    def _dependentRequired(self, node: Subschema) -> list[list[Alternative]]:  # noqa: N802
        path = f"{node.path}.dependentRequired"
        return [
            self._dependency(name, {"required": [name, *_strings(needed, f"{path}.{name}")]}, f"{path}.{name}")
            for name, needed in mapping(node.schema["dependentRequired"], path).items()
        ]

    def _dependentSchemas(self, node: Subschema) -> list[list[Alternative]]:  # noqa: N802
        path = f"{node.path}.dependentSchemas"
        return [
            self._dependency(name, schema, f"{path}.{name}")
            for name, schema in mapping(node.schema["dependentSchemas"], path).items()
        ]

    def _dependencies(self, node: Subschema) -> list[list[Alternative]]:
        path = f"{node.path}.dependencies"
        return [
            self._dependency(
                name, {"required": [name, *_strings(needed, path)]} if isinstance(needed, list) else needed, path
            )
            for name, needed in mapping(node.schema["dependencies"], path).items()
        ]

    def _dependency(self, name: str, schema: Any, path: str) -> list[Alternative]:
        """Without the property, or with it and valid under the schema."""
        absent = Subschema({"properties": {name: False}}, f"{path}#absent")
        present = Alternative((Subschema({"required": [name]}, f"{path}#present"),))
        return [Alternative((absent,)), *(one.also(present) for one in self._read(Subschema(schema, path)))]

    def _listed(self, node: Subschema, keyword: str) -> list[Subschema]:
        path = f"{node.path}.{keyword}"
        schemas = node.schema[keyword]
        if not isinstance(schemas, list) or not schemas:
            raise refusal(path, "should be a list of schemas")
        return [Subschema(one, f"{path}.{number}") for number, one in enumerate(schemas)]


# --- what keywords say ------------------------------------------------------------------------------------------------


def refusal(path: str, why: str) -> InvalidRequest:
    """Of a schema, by the path of what is wrong."""
    return InvalidRequest(f"{path}: {why}", param=path)


def mapping(value: Any, path: str) -> Mapping[str, Any]:
    """An object of a schema. Raises InvalidRequest."""
    if not isinstance(value, dict):
        raise refusal(path, "should be an object")
    return value


def _strings(value: Any, path: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise refusal(path, "should be a list of strings")
    return value


def strings(alternative: Alternative, keyword: str) -> set[str]:
    """All that its views list by a keyword. Raises InvalidRequest."""
    return {one for value, path in alternative.of(keyword) for one in _strings(value, path)}


def counts(alternative: Alternative, least: str, most: str) -> tuple[int, int | None]:
    """Both bounds of a size. Raises InvalidRequest."""
    lows = [_count(value, path) for value, path in alternative.of(least)]
    highs = [_count(value, path) for value, path in alternative.of(most)]
    return max(lows, default=0), min(highs, default=None)


def _count(value: Any, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value):
        raise refusal(path, f"should be an integer of at least 0; got {value!r:.80}")
    return int(value)


def types(alternative: Alternative) -> tuple[set[str], bool]:
    """The types that its views allow, and whether numbers have to be integers. Raises InvalidRequest."""
    allowed, integers = set(TYPES), False
    for value, path in alternative.of("type"):
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not names or not {*map(str, names)} <= {*TYPES, "integer"}:
            raise refusal(path, f"should be of {', '.join(TYPES)}, integer; got {value!r:.80}")
        allowed &= {"number" if name == "integer" else name for name in names}
        integers = integers or ("integer" in names and "number" not in names)
    return allowed, integers


def written_types(alternative: Alternative) -> set[str]:
    """Those that are generated: where no view names a type, those that keywords are about."""
    allowed, _ = types(alternative)
    if any(True for _ in alternative.of("type")):
        return allowed
    about = {
        kind
        for kind, names in BY_TYPE.items()
        if any(name in schema for schema, _ in alternative.views for name in names)
    }
    return allowed & about if about else allowed


def literals(alternative: Alternative) -> list[Any] | None:
    """The values that enum and const leave, not yet held against the other keywords; None: there are neither. Raises
    InvalidRequest."""
    for value, _ in alternative.of("enum"):
        return list(value)
    for value, _ in alternative.of("const"):
        return [value]
    return None


def _check_depth(schema: Any, field: str) -> None:
    level = [schema]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise refusal(field, f"nests deeper than {MAX_DEPTH} levels")
