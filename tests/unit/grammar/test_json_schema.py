"""What is generated for a schema is valid under it, keyword by keyword; what can't be enforced is refused by path."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from lightllmd.errors import InvalidRequest
from lightllmd.grammar.ebnf.json_schema import USUAL, layout, schema_grammar
from matching import Matching

INTEGER, STRING = {"type": "integer"}, {"type": "string"}
A_AND_B = {"a": INTEGER, "b": STRING}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["next"],
        }
    },
    "$ref": "#/$defs/node",
}
CATS_AND_DOGS = {
    "oneOf": [
        {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": INTEGER}, "required": ["kind"]},
        {"type": "object", "properties": {"kind": {"enum": ["dog", "hound"]}}, "required": ["kind"]},
    ]
}
# A schema, values or texts that may be generated, and some that may not.
CASES: list[tuple[dict[str, Any] | bool, list[Any], list[Any]]] = [
    (INTEGER, [0, -7, 10**17], [1.5, "1", True, None, [1]]),
    ({"type": "number"}, [0, -1.25, 1e10, 12], ["1", None]),
    ({"type": "integer", "minimum": -3, "exclusiveMaximum": 27}, [-3, 0, 26], [-4, 27, 100, -30]),
    ({"type": "integer", "minimum": 1.5, "maximum": 3.5}, [2, 3], [1, 4]),
    ({"type": "integer", "minimum": 10**18, "maximum": 10**19}, [10**18, 10**19], [10**18 - 1, 10**19 + 1, 5]),
    ({"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 50}, [0, 7, 49], [1, 50, 56, -7]),
    ({"type": "integer", "multipleOf": 25}, [0, 25, -75, 1000], [1, 30, 1001]),
    ({"type": "number", "minimum": -1.5, "exclusiveMaximum": 2.25}, [-1.5, 0.1, 2.2499], [-1.51, 2.25, 3, -2]),
    ({"type": "number", "exclusiveMinimum": 0}, [0.001, 7], [0, 0.0, -1]),
    ({"type": "number", "minimum": 0.30000000000000004}, [0.5, 0.30000000000000004], [0.3, 0.1]),
    ({"type": "number", "multipleOf": 0.01}, [0, 12.25, -3.5, 7], [0.005, 1.001, -2.125]),
    (
        {"type": "number", "multipleOf": 0.01, "exclusiveMinimum": 0, "maximum": 10000},
        [0.01, 9999.5, 10000, 5, 0.25],
        [0, 0.0, 0.001, 10000.25, -1],
    ),
    ({"type": "number", "multipleOf": 0.5, "minimum": 0}, [0, 0.5, 3, 12.5], [0.25, 1.1, -0.5]),
    ({"type": "number", "multipleOf": 0.75, "minimum": 1, "maximum": 3}, [1.5, 2.25, 3], [0.75, 1, 2.5, 3.75]),
    (
        {"allOf": [{"multipleOf": 0.5}, {"multipleOf": 0.75}], "type": "number", "maximum": 9, "minimum": 0},
        [1.5],
        [0.75],
    ),
    ({"type": "integer", "multipleOf": 0.1}, [0, 7, -12], [0.1]),
    ({"type": "integer", "multipleOf": 1.5}, [0, 3, 12], [1, 2, 1.5]),
    ({"type": "object", "properties": {}}, [{}], [{"a": 1}]),
    ({"type": ["boolean", "null"]}, [True, False, None], [0, "true"]),
    (
        {"type": "string", "minLength": 2, "maxLength": 4},
        ["ab", "äöü", "😀😀"],
        ["a", "abcde", "😀" * 5, ""],
    ),
    ({"type": "string", "pattern": "^a+b$"}, ["ab", "aab"], ["b", "xab", "abx", ""]),
    ({"type": "string", "minLength": 1}, ["a", '"ab', "\n", "a\\\té"], [""]),
    ({"type": "string", "minLength": 2}, ["ab", 'ab"\\\n\t'], ["a", ""]),
    ({"type": "string", "pattern": "[0-9]x"}, ["3x", 'say "3x"\n'], ["x3", ""]),
    ({"type": "string", "pattern": '^[^"]$|\\\\'}, ["a", "\n", "\\", 'x\\"'], ['"', "ab"]),
    ({"type": "string", "pattern": "^[a-z]*$", "minLength": 2, "maxLength": 3}, ["ab", "abc"], ["a", "abcd"]),
    ({"type": "string", "pattern": "^[a-z]+-\\d*$", "minLength": 4, "maxLength": 8}, ["abc-12"], ["a-1", "abcdefgh-"]),
    (
        {"type": "string", "format": "uri", "minLength": 1, "maxLength": 30},
        ["https://ab.org/x"],
        ["https://ab.org/" + "x" * 30],
    ),
    ({"type": "string", "format": "email", "pattern": "^a@[b-d]+$"}, ["a@bcd"], ["x@y.org"]),
    ({"type": "string", "pattern": "^x[a-z]+-$", "maxLength": 4}, ["xa-", "xab-"], ["xabc-"]),
    ({"type": "string", "format": "date"}, ["2024-02-29", "1999-12-31"], ["2023-02-29", "2020-13-01", "today"]),
    ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
    ({"type": "string", "format": "a house style"}, ["anything"], []),
    ({"enum": [1, "a", None, [1, {"x": 2}], 1.5, True]}, [1, "a", None, [1, {"x": 2}], True], [2, "b", False]),
    ({"type": "string", "enum": [1, "a", 'é"\n'], "maxLength": 3}, ["a", 'é"\n'], [1]),
    ({"const": {"a": [1, 2]}}, [{"a": [1, 2]}], [{"a": [1]}]),
    ({"type": "object", "properties": A_AND_B, "required": ["a"]}, [{"a": 1}, {"a": 1, "b": "x"}], [{}, {"b": "x"}]),
    (
        {"type": "object", "properties": A_AND_B, "additionalProperties": True},
        [{}, {"b": "x", "c": []}, {"bb": 1}],
        ['{"a":"x"}', '{"c":1,"a":"x"}', '{"\\u0061":"x"}'],
    ),
    ({"type": "object", "additionalProperties": INTEGER, "minProperties": 1}, [{"x": 1}], [{}, {"x": "1"}]),
    ({"type": "object", "required": ["z"]}, [{"z": 1}], [{}, {"a": 1}]),
    (
        {"type": "object", "properties": A_AND_B, "minProperties": 1, "maxProperties": 1},
        [{"a": 1}],
        [{}, {"a": 1, "b": ""}],
    ),
    ({"type": "object", "patternProperties": {"^x": INTEGER}}, [{}, {"xa": 1}], [{"xa": "s"}, {"y": 1}]),
    (
        {"type": "object", "propertyNames": {"enum": ["p", "q"]}, "additionalProperties": INTEGER},
        [{}, {"p": 1, "q": 2}],
        [{"r": 1}, {"p": "x"}],
    ),
    ({"type": "object", "propertyNames": {"pattern": "^[a-c]+$"}}, [{"ab": None}], [{"d": 1}]),
    (
        {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "dependentRequired": {"a": ["b"]}},
        [{}, {"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1}],
    ),
    ({"type": "object", "properties": {"a": False, "b": True}}, [{}, {"b": [1]}], [{"a": 1}]),
    ({"properties": {"a": INTEGER}, "required": ["a"]}, [{"a": 1}], [{"a": "x"}]),
    ({"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 3}, [[1, 2], [1, 2, 3]], [[1], [1] * 4, ["a", 1]]),
    ({"type": "array", "prefixItems": [INTEGER, STRING], "items": False}, [[], [1], [1, "x"]], [["x"], [1, "x", 2]]),
    ({"type": "array", "prefixItems": [INTEGER], "items": STRING, "maxItems": 2}, [[1, "x"]], [[1, 2], [1, "x", "y"]]),
    ({"type": "array", "minItems": 1, "maxItems": 2}, [[1], [1, "a"]], [[], [1, 2, 3]]),
    ({"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True}, [[], ["b", "a"]], [["a", "a"]]),
    (
        {"type": "array", "items": STRING, "contains": {"const": "x"}},
        [["x"], ["a", "x", "b"], ["x", "x"]],
        [[], ["a"], ["a", "b"], [1, "x"]],
    ),
    (
        {"type": "array", "contains": CATS_AND_DOGS["oneOf"][0], "minItems": 2, "maxItems": 3},
        [[{"kind": "cat"}, 1], [1, 2, {"kind": "cat"}]],
        [[{"kind": "cat"}], [1, 2, 3], [1, 2, 3, {"kind": "cat"}]],
    ),
    (
        {"type": "array", "items": INTEGER, "contains": {"minimum": 5}, "minContains": 2},
        [[5, 6], [1, 7, 2, 8], [5, 5, 5]],
        [[5], [1, 2], [1, 7, 2]],
    ),
    (
        {"type": "array", "items": {"enum": ["a", "b"]}, "contains": {"const": "a"}, "maxContains": 1},
        [["a"], ["b", "a", "b"]],
        [[], ["b"], ["a", "a"], ["a", "b", "a"]],
    ),
    (
        {"type": "array", "items": {"enum": [1, 2]}, "contains": {"const": 1}, "minContains": 0, "maxContains": 1},
        [[], [2, 2], [2, 1]],
        [[1, 1]],
    ),
    (
        {"type": "array", "prefixItems": [STRING, INTEGER], "items": INTEGER, "contains": {"const": 7}, "maxItems": 3},
        [["a", 7], ["a", 1, 7]],
        [["a"], ["a", 1], [7, 1], ["a", 1, 1, 7]],
    ),
    (
        {"type": "array", "prefixItems": [STRING], "items": False, "contains": INTEGER, "minContains": 0},
        [[], ["a"]],
        [[1]],
    ),
    ({"enum": [[1, 2], [3], []], "contains": {"const": 3}}, [[3]], [[1, 2], []]),
    ({"type": "array", "items": INTEGER, "minContains": 3}, [[], [1]], [["a"]]),
    (
        {"oneOf": [{"type": "array", "items": INTEGER, "contains": {"const": 1}}, {"type": "string"}]},
        [[1], "a"],
        [[2], []],
    ),
    ({"anyOf": [INTEGER, STRING]}, [1, "a"], [None, [1]]),
    ({"type": "integer", "anyOf": [INTEGER, STRING], "maximum": 5}, [1], ["a", 6]),
    ({"allOf": [{"properties": A_AND_B}, {"required": ["b"]}, {"type": "object"}]}, [{"b": "x"}], [{"a": 1}]),
    (CATS_AND_DOGS, [{"kind": "cat", "lives": 9}, {"kind": "dog"}], [{"kind": "cow"}, {}]),
    ({"oneOf": [INTEGER, STRING, {"type": "null"}]}, [1, "a", None], [1.5]),
    ({"enum": ["a", "b", "c"], "not": {"const": "b"}}, ["a", "c"], ["b"]),
    (
        {
            "properties": {"k": {"enum": ["x", "y"]}, "n": INTEGER},
            "required": ["k"],
            "if": {"properties": {"n": STRING}, "required": ["n"]},
            "then": False,
        },
        [{"k": "x", "n": 1}, {"k": "y"}],
        [{"n": 1}],
    ),
    (TREE, [{"next": None}, {"next": {"next": None}}], [{}, {"next": {}}]),
    ({"$defs": {"a/b c": INTEGER}, "$ref": "#/$defs/a~1b%20c", "minimum": 5}, [5], [4, "a"]),
    ({"type": "object", "properties": {"c": {"type": "array", "items": {"$ref": "#"}}}}, [{"c": [{}]}], [{"c": [1]}]),
    (True, [1, "a", [{"x": [None]}], 1.5], []),
    ({"title": "T", "description": "D", "examples": [1], "x-house": {}, "default": 3, "deprecated": True}, [1, {}], []),
]


@pytest.fixture(scope="module")
def matching() -> Matching:
    return Matching()


@pytest.mark.parametrize(("schema", "good", "bad"), CASES, ids=lambda value: "")
def test_what_a_schema_lets_through(
    matching: Matching, schema: dict[str, Any] | bool, good: list[Any], bad: list[Any]
) -> None:
    grammar = schema_grammar(schema, "schema")
    validator = jsonschema.Draft202012Validator(schema)
    for value in good:
        assert validator.is_valid(value)
        assert matching.accepts(grammar, json.dumps(value, ensure_ascii=False)), value
        assert matching.accepts(grammar, json.dumps(value, ensure_ascii=False, separators=(",", ":"))), value
    for value in bad:
        text = value if isinstance(value, str) and value.startswith("{") else json.dumps(value)
        assert not matching.accepts(grammar, text), text


OPEN = {"type": "object", "properties": {"x": {"type": "integer"}}}
REFUSED: list[tuple[Any, str]] = [
    ({"properties": {"x": {"not": {"type": "string"}}}}, "f.properties.x.not: what can be generated may be valid"),
    (
        {"properties": {"x": {"items": {"enum": [1, 2]}, "contains": {}, "uniqueItems": True}}},
        "f.properties.x.contains: ",
    ),
    (
        {"type": "array", "items": INTEGER, "contains": {"minimum": 5}, "maxContains": 1},
        "f.contains.not.not: what can be",
    ),
    (
        {"type": "array", "allOf": [{"contains": {"const": 1}}, {"contains": {"const": 2}}]},
        "f.allOf.1.contains: can't be",
    ),
    (
        {"type": "array", "contains": {"const": 1}, "minContains": 10**4},
        "f.contains: 10000 of 1 items are more than can",
    ),
    (
        {"type": "array", "contains": {"const": 1}, "minContains": -1},
        "f.minContains: should be an integer of at least 0",
    ),
    ({"type": "array", "items": STRING, "contains": INTEGER}, "f: no value is valid"),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "f.uniqueItems: "),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "f.oneOf: two of its schemas may be valid at once"),
    ({"oneOf": [OPEN, OPEN]}, "f.oneOf: two of its schemas"),
    ({"type": "object", "if": {"required": ["a"]}, "then": {}, "properties": {"a": {}}}, "f.if: "),
    ({"type": "number", "multipleOf": 0.3}, "f.multipleOf: multiples of 0.3 can't be enforced within these bounds"),
    ({"type": "number", "multipleOf": 0.5, "minimum": 3}, "f.multipleOf: multiples of 0.5 can't be enforced within"),
    ({"type": "number", "multipleOf": -0.5}, "f.multipleOf: should be above 0; got -0.5"),
    ({"type": "string", "pattern": "(?=x)"}, r"f.pattern: look-ahead \(\(\?=x…\) can't be enforced, at character 1"),
    ({"type": "string", "pattern": "("}, r"f.pattern: a \) is missing"),
    (
        {"type": "string", "pattern": "^(ab)+$", "maxLength": 3},
        "f.maxLength: can't be enforced together with f.pattern",
    ),
    (
        {"allOf": [{"pattern": "a"}, {"pattern": "b"}], "type": "string"},
        "f.allOf.1.pattern: can't be enforced together",
    ),
    ({"type": "string", "format": "regex"}, "f.format: can't be enforced; got 'regex'"),
    ({"type": "object", "unevaluatedProperties": {"type": "string"}}, "f.unevaluatedProperties: "),
    ({"type": "object", "additionalProperties": True, "minProperties": 2}, "f.minProperties: "),
    ({"type": "object", "patternProperties": {"^a": {}, "b$": {}}}, r"f.patternProperties.\^a: names that match one"),
    ({**OPEN, "patternProperties": {"^x": {}}}, r"f.patternProperties.\^x: the name of the property 'x' matches"),
    ({"$ref": "other.json#/x"}, r"f.\$ref: only references within the schema"),
    ({"$ref": "#/$defs/x"}, r"f.\$ref: there is no #/\$defs/x"),
    ({"$defs": {"x": {"$ref": "#/$defs/x"}}, "$ref": "#/$defs/x"}, "refers to itself"),
    ({"$dynamicRef": "#x"}, r"f.\$dynamicRef: "),
    ({"type": "strin"}, "f.type: should be of null, .*; got 'strin'"),
    ({"properties": {"a": 5}, "type": "object"}, "f.properties.a: should be an object or a boolean"),
    ({"properties": []}, "f.properties: should be an object"),
    ({"type": "object", "required": "a"}, "f.required: should be a list of strings"),
    ({"type": "integer", "minimum": "3"}, "f.minimum: should be a number; got '3'"),
    ({"type": "string", "maxLength": -1}, "f.maxLength: should be an integer of at least 0; got -1"),
    ({"enum": 3}, "f.enum: should be a list"),
    ({"anyOf": []}, "f.anyOf: should be a list of schemas"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "f: no value is valid under this schema"),
    (False, "f: no value is valid under this schema"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "f: no value is valid"),
    ([1], "f: should be an object or a boolean"),
    ({"allOf": [{"anyOf": [{"minimum": n} for n in range(9)]} for _ in range(9)]}, "f: combines to more than 512"),
    ({"type": "string", "minLength": 10**9}, "f.minLength: more than 100000 are never generated"),
]


@pytest.mark.parametrize(("schema", "says"), REFUSED, ids=lambda value: "")
def test_what_can_not_be_enforced_is_refused_by_its_path(schema: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        schema_grammar(schema, "f")
    assert refused.value.message.startswith(str(refused.value.parameters["param"]) + ":")


def test_a_schema_that_grows_by_references_is_refused_in_time() -> None:
    doubling = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)}
    with pytest.raises(InvalidRequest, match="takes more than 20000 steps to read"):
        schema_grammar({"$defs": {**doubling, "d40": {"type": "string"}}, "$ref": "#/$defs/d0"}, "f")
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(InvalidRequest, match="f: nests deeper than 64 levels"):
        schema_grammar(deep, "f")


def test_white_space_is_a_space_or_as_a_pattern_has_it(matching: Matching) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": INTEGER}}}
    usual, own = schema_grammar(schema, "f", USUAL), schema_grammar(schema, "f", layout("[ \n]{0,4}", "w"))
    assert matching.accepts(usual, '{"a": [1, 2,3]}')
    assert not matching.accepts(usual, '{"a":  [1]}')
    assert not matching.accepts(usual, '{ "a":[1]}')
    assert matching.accepts(own, '{\n  "a" : [ 1,\n2 ]\n}')
    with pytest.raises(InvalidRequest, match="w: should match spaces, tabs and ends of lines only; got 'x'"):
        layout("x", "w")
