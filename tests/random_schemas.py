"""JSON schemas, patterns and grammars that a seed draws: nested objects, enums, patterns, references, `oneOf`, arrays
with bounds, and combinations of them, as clients write them."""

from __future__ import annotations

import random
from typing import Any

PATTERNS = (
    *("^[a-z]{1,8}$", "^[A-Z]{2}-[0-9]{3,4}$", "^(yes|no|maybe)$", "^#[0-9a-fA-F]{6}$", "^\\d{3}-\\d{4}$"),
    *('^[^"\\\\]{2,5}$', "x[0-9]", "^v\\d+(\\.\\d+){1,2}$", "^\\w+@\\w+\\.(com|org)$", "^(a|bc)*d?$", "^\\S{3}$"),
)
FORMATS = ("date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "hostname", "duration", "uri")
NAMES = ("name", "age", "kind", "items", "tags", "city", "zip code", "é", 'a"b', "x", "value", "next", "on/off")
WORDS = ("red", "green", "blue", "ünï", 'say "hi"', "back\\slash", "", "new\nline")


class Schemas:
    """Drawn one after the other."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._definitions: dict[str, Any] = {}

    def next(self) -> dict[str, Any]:
        """An object at the top, most often."""
        self._definitions = {}
        drawn = self._object(0) if self._random.random() < 0.8 else self._any(0)
        if self._definitions:
            drawn = {**drawn, "$defs": self._definitions}
        return drawn

    def _any(self, depth: int) -> dict[str, Any]:
        simple = (self._string, self._integer, self._number, self._literal, self._boolean)
        nested = (self._object, self._array, self._union, self._one_of, self._reference, self._all_of, self._recursive)
        if depth >= 3 or self._random.random() < 0.55:
            return self._random.choice(simple)(depth)
        return self._random.choice(nested)(depth)

    # --- values without others inside -----------------------------------------------------------------------------

    def _string(self, depth: int) -> dict[str, Any]:
        draw = self._random
        schema: dict[str, Any] = {"type": "string"}
        match draw.randrange(5):
            case 0:
                schema["pattern"] = draw.choice(PATTERNS)
            case 1:
                schema["format"] = draw.choice(FORMATS)
            case 2:
                schema["minLength"] = draw.randrange(4)
                schema["maxLength"] = schema["minLength"] + draw.randrange(12)
            case 3:
                schema["maxLength"] = draw.randrange(1, 30)
                schema["title"] = "Title"
            case 4:
                schema |= {"pattern": "^[a-z]+$", "maxLength": draw.randrange(1, 9)}
        return schema

    def _integer(self, depth: int) -> dict[str, Any]:
        draw = self._random
        schema: dict[str, Any] = {"type": "integer"}
        low = draw.randrange(-300, 300)
        if draw.random() < 0.6:
            schema[draw.choice(("minimum", "exclusiveMinimum"))] = low
        if draw.random() < 0.6:
            schema[draw.choice(("maximum", "exclusiveMaximum"))] = low + draw.randrange(3, 5000)
        if draw.random() < 0.2:
            schema = {"type": "integer", "multipleOf": draw.choice((2, 3, 5, 7, 10, 25))}
        return schema

    def _number(self, depth: int) -> dict[str, Any]:
        draw = self._random
        schema: dict[str, Any] = {"type": "number"}
        low = round(draw.uniform(-20, 20), draw.randrange(4))
        if draw.random() < 0.6:
            schema[draw.choice(("minimum", "exclusiveMinimum"))] = low
        if draw.random() < 0.6:
            schema[draw.choice(("maximum", "exclusiveMaximum"))] = round(low + draw.uniform(0.01, 90), 3)
        if len(schema) == 3 and draw.random() < 0.3:  # few, so that doubles can be their exact multiples
            schema |= {"multipleOf": draw.choice((0.5, 0.25))}
        return schema

    def _boolean(self, depth: int) -> dict[str, Any]:
        return {"type": self._random.choice(("boolean", "null", ["boolean", "null"], ["integer", "null"]))}

    def _literal(self, depth: int) -> dict[str, Any]:
        draw = self._random
        values: list[Any] = draw.sample([*WORDS, 1, 2.5, None, True, [1, "a"], {"k": {"v": []}}], draw.randrange(1, 5))
        if draw.random() < 0.4:
            return {"type": "string", "enum": draw.sample(WORDS, draw.randrange(1, 5))}
        return {"enum": values} if draw.random() < 0.7 else {"const": values[0]}

    # --- values with others inside --------------------------------------------------------------------------------

    def _object(self, depth: int) -> dict[str, Any]:
        draw = self._random
        names = draw.sample(NAMES, draw.randrange(1, 5))
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self._any(depth + 1) for name in names},
            "required": [name for name in names if draw.random() < 0.6],
        }
        match draw.randrange(9):
            case 0:
                schema["additionalProperties"] = False
            case 1:
                schema["additionalProperties"] = self._any(3)
            case 2:
                schema["maxProperties"] = max(1, len(schema["required"]), draw.randrange(1, 4))
            case 3:
                schema["minProperties"] = draw.randrange(1, len(names) + 1)
            case 4:
                schema = {"type": "object", "patternProperties": {"^[a-z]{1,3}$": self._any(3)}}
            case 5:
                schema = {"type": "object", "additionalProperties": self._any(3), "maxProperties": 3}
                schema["propertyNames"] = draw.choice(({"enum": ["a", "b", "c"]}, {"pattern": "^[A-Z]+$"}))
            case 6 if len(names) > 1:
                schema["dependentRequired"] = {names[0]: [names[1]]}
        return schema

    def _array(self, depth: int) -> dict[str, Any]:
        draw = self._random
        schema: dict[str, Any] = {"type": "array", "items": self._any(depth + 1)}
        schema["minItems"] = draw.randrange(3)
        schema["maxItems"] = schema["minItems"] + draw.randrange(1, 4)
        if draw.random() < 0.25:
            schema["prefixItems"] = [self._any(depth + 1) for _ in range(draw.randrange(1, 3))]
        if draw.random() < 0.2:
            schema = {"type": "array", "items": {"enum": draw.sample(WORDS, 4)}, "uniqueItems": True, "minItems": 2}
        return schema

    def _union(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._any(depth + 1) for _ in range(self._random.randrange(2, 4))]}

    def _one_of(self, depth: int) -> dict[str, Any]:
        """Told apart by a property, or by their types."""
        draw = self._random
        if draw.random() < 0.4:
            return {"oneOf": [self._string(depth), {"type": "integer", "minimum": 0}, {"type": "null"}]}
        branches = []
        for kind in draw.sample(("cat", "dog", "cow"), 2):
            branch = self._object(max(depth + 1, 2))
            properties = {"kind": {"const": kind}, **branch.get("properties", {"x": {"type": "integer"}})}
            properties["kind"] = {"const": kind}
            branches.append({"type": "object", "properties": properties, "required": ["kind"]})
        return {"oneOf": branches}

    def _all_of(self, depth: int) -> dict[str, Any]:
        """Properties of two schemas, and a bound of one of them more."""
        low = self._random.randrange(-9, 9)
        return {
            "allOf": [
                {"type": "object", "properties": {"low": {"type": "integer", "minimum": low}}, "required": ["low"]},
                {"properties": {"low": {"maximum": low + 40}, "other": self._any(3)}, "required": ["other"]},
            ]
        }

    def _reference(self, depth: int) -> dict[str, Any]:
        name = f"part {len(self._definitions)}"
        self._definitions[name] = {}
        self._definitions[name] = self._any(depth + 1)
        return {"$ref": f"#/$defs/{name.replace(' ', '%20')}"}

    def _recursive(self, depth: int) -> dict[str, Any]:
        name = f"tree{len(self._definitions)}"
        here = {"$ref": f"#/$defs/{name}"}
        self._definitions[name] = {}
        self._definitions[name] = {
            "type": "object",
            "properties": {
                "value": self._any(3),
                "children": {"type": "array", "items": here, "maxItems": 2},
                "next": {"anyOf": [{"type": "null"}, here]},
            },
            "required": ["value", "next"],
        }
        return here


def pattern(draw: random.Random, depth: int = 0) -> str:
    """A regular expression that ECMA 262 and Python read alike."""
    atoms = ("a", "b", "[a-c]", "[^a-y\\s]", "\\d", "\\w", "\\.", "é", "[0-9A-F]", "\\s", "x-", '"', "\\\\", "\\u00e9")
    parts = []
    for _ in range(draw.randrange(1, 5)):
        atom = draw.choice(atoms)
        if depth < 2 and draw.random() < 0.25:
            inner = "|".join(pattern(draw, depth + 1) for _ in range(draw.randrange(1, 4)))
            atom = f"{draw.choice(('(', '(?:'))}{inner})"
        elif len(atom) == 2 and atom == "x-":
            parts.append("x-")
            continue
        parts.append(atom + draw.choice(("", "", "", "?", "+", "*", "{2}", "{1,3}", "{2,}", "+?")))
    return "".join(parts)
