"""Calls whose arguments stand one by one between marks, as text rather than JSON. What JSON they are is a matter of the
tool's schema.

    Qwen3-Coder  <tool_call>
                 <function=f>
                 <parameter=a>
                 1
                 </parameter>
                 </function>
                 </tool_call>
    GLM-4.5      <tool_call>f
                 <arg_key>a</arg_key>
                 <arg_value>1</arg_value>
                 </tool_call>
    MiniMax-M2   <minimax:tool_call>
                 <invoke name="f">
                 <parameter name="a">1</parameter>
                 </invoke>
                 </minimax:tool_call>
    DeepSeek V3.2  <｜DSML｜function_calls>
                 <｜DSML｜invoke name="f">
                 <｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>
                 </｜DSML｜invoke>
                 </｜DSML｜function_calls>
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightllmd.dialogue.parser import MAX_HELD, MAX_NAME, MarkParser, marks_of

_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
_STRING = "string"
_MOST_HEADER = 2 * MAX_NAME  # characters


@dataclass(frozen=True)
class ElementMarks:
    """What stands around the parts of a call."""

    open: str
    name_end: str  # "": a line's end, or the next mark
    key: str
    key_end: str
    value: str  # "": the value follows its key at once
    value_end: str
    close: str
    around: tuple[str, ...] = ()  # all calls, or each
    lines: bool = False  # a line break before and after a value is none of it
    told: str = ""  # what parts a key from "true" for a value that is a text, "false" for one that is JSON

    @property
    def all(self) -> frozenset[str]:
        """Every one that may be a token."""
        marks = (self.open, self.key, self.key_end, self.value, self.value_end, self.close, *self.around)
        return frozenset(mark for mark in marks if len(mark) > 1)


QWEN_CODER = ElementMarks(
    "<function=", ">", "<parameter=", ">", "", "</parameter>", "</function>", ("<tool_call>", "</tool_call>"), True
)
SEED = ElementMarks(
    "<function=", ">", "<parameter=", ">", "", "</parameter>", "</function>", ("<seed:tool_call>", "</seed:tool_call>")
)
GLM = ElementMarks("<tool_call>", "", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>")
MINIMAX = ElementMarks(
    '<invoke name="',
    '">',
    '<parameter name="',
    '">',
    "",
    "</parameter>",
    "</invoke>",
    ("<minimax:tool_call>", "</minimax:tool_call>"),
)
DSML = "｜DSML｜"  # a token
DEEPSEEK_DSML = ElementMarks(
    f'<{DSML}invoke name="',
    '">',
    f'<{DSML}parameter name="',
    '">',
    "",
    f"</{DSML}parameter>",
    f"</{DSML}invoke>",
    (f"<{DSML}function_calls>", f"</{DSML}function_calls>"),
    told='" string="',
)


class ElementParser(MarkParser):
    """Of all of them."""

    def __init__(
        self,
        marks: ElementMarks,
        schemas: Mapping[str, Mapping[str, Any]],
        *,
        think: tuple[str, str] | None = None,
        inside: bool = False,
    ) -> None:
        """`schemas`: of the arguments, by tool; otherwise see MarkParser."""
        super().__init__([marks.open, *marks.around], think=think, inside=inside)
        self._call_marks = marks
        self._schemas = schemas
        self._schema: Mapping[str, Any] = {}
        self._raw = ""  # what would be content if it were no call
        self._keys = 0  # arguments that were begun
        self._key, self._told = "", ""
        self._value_marks = marks_of(frozenset({marks.value_end}))
        ends = [marks.name_end] if marks.name_end else ["\n", marks.key, marks.close]
        self._name_ends = marks_of(frozenset(ends))
        self._types: frozenset[str] = frozenset()
        self._value: list[str] | None = None  # of the argument, where all of it has to be there first
        self._value_size = 0
        self._edge = ""  # line breaks that may be the last of the value
        self._first = True  # nothing of the value was read

    def _on_mark(self, mark: str) -> None:
        if mark == self._call_marks.open:
            self._raw = mark
            self._state = self._in_name

    def _in_name(self) -> bool:
        found = self._name_ends.find(self._held, _MOST_HEADER)
        if found is None and len(self._held) < _MOST_HEADER:
            return False
        name = "" if found is None else self._held[: found[0]].strip()
        if found is None or not name or len(name) > MAX_NAME or "<" in name:
            self._give_back(self._raw)
            return True
        end = found[0] + (len(found[1]) if found[1] not in (self._call_marks.key, self._call_marks.close) else 0)
        self._held = self._held[end:]
        self._keys = 0
        self._schema = self._schemas.get(name, {})
        self._begin_call(name)
        self._state = self._between
        return True

    def _between(self) -> bool:
        """Before a key, or the end of the call."""
        self._held = held = self._held.lstrip()
        marks = self._call_marks
        for mark in (marks.key, marks.close):
            if held.startswith(mark):
                self._held = held[len(mark) :]
                if mark == marks.key:
                    self._state = self._in_key
                else:
                    self._add_arguments("}" if self._keys else "{}")
                    self._end_call()
                    self._to_content()
                return True
            if mark.startswith(held):
                return False
        self._break_off()
        return True

    def _break_off(self) -> None:
        """What follows belongs to no call."""
        self._add_arguments("}" if self._keys else "{}")
        self._end_call()
        self._to_content()

    def _in_key(self) -> bool:
        end = self._held.find(self._call_marks.key_end, 0, _MOST_HEADER)
        if end < 0:
            if len(self._held) < _MOST_HEADER:
                return False
            self._break_off()
            return True
        key, _, self._told = self._held[:end].partition(self._call_marks.told or "\0")
        self._key = key.strip()
        self._held = self._held[end + len(self._call_marks.key_end) :]
        self._add_arguments(("{" if not self._keys else ", ") + json.dumps(self._key, ensure_ascii=False) + ": ")
        self._keys += 1
        self._state = self._before_value if self._call_marks.value else self._begin_value()
        return True

    def _before_value(self) -> bool:
        self._held = held = self._held.lstrip()
        mark = self._call_marks.value
        if held.startswith(mark):
            self._held = held[len(mark) :]
            self._state = self._begin_value()
            return True
        if mark.startswith(held):
            return False
        self._add_arguments("null")
        self._break_off()
        return True

    def _begin_value(self) -> Any:
        self._types = TOLD.get(self._told) or value_types(self._schema, self._key)
        self._value = None if self._types == {_STRING} else []
        self._value_size, self._edge, self._first = 0, "", True
        if self._value is None:
            self._add_arguments('"')
        return self._in_value

    def _in_value(self) -> bool:
        held = self._held
        found = self._value_marks.find(held)
        end = self._value_marks.clear(held) if found is None else found[0]
        text, self._held = held[:end], held[end if found is None else end + len(found[1]) :]
        if self._call_marks.lines:
            text = self._without_lines(text)
        self._take_value(text)
        if found is None:
            return False
        self._end_value()
        return True

    def _without_lines(self, text: str) -> str:
        """The value without the line breaks around it."""
        if self._first and text:
            self._first = False
            text = text.removeprefix("\n")
        text = self._edge + text
        self._edge = "\n" if text.endswith("\n") else ""
        return text.removesuffix("\n")

    def _take_value(self, text: str) -> None:
        if self._value is None:
            self._add_arguments(_in_string(text))
            return
        self._value.append(text)
        self._value_size += len(text)
        if self._value_size > MAX_HELD:  # it is told as it comes, for which it has to be a text
            held, self._value = "".join(self._value), None
            self._add_arguments('"' + _in_string(held))

    def _end_value(self) -> None:
        if self._value is None:
            self._add_arguments('"')
        else:
            self._add_arguments(as_json("".join(self._value), self._types))
        self._value = None
        self._state = self._between

    def _at_end(self) -> None:
        if self._call_open:
            if self._state == self._in_value:
                self._take_value(self._held)
                if self._value:
                    self._add_arguments("".join(self._value))
            self._held = ""
        elif self._state == self._in_name:
            self._held = self._raw + self._held
        super()._at_end()


def _in_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


_ALL_TYPES = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
TOLD = {"true": frozenset({_STRING}), "false": _ALL_TYPES - {_STRING}}  # what a value may be that is said to be a text


def value_types(schema: Mapping[str, Any], key: str) -> frozenset[str]:
    """JSON's names of the types that an argument may have; all where the schema doesn't say."""
    properties = schema.get("properties")
    told = properties.get(key) if isinstance(properties, Mapping) else None
    return _types(told) if isinstance(told, Mapping) else _ALL_TYPES


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    kind = schema.get("type")
    if isinstance(kind, str):
        return frozenset({kind})
    if isinstance(kind, list):
        return frozenset(one for one in kind if isinstance(one, str)) or _ALL_TYPES
    for word in ("anyOf", "oneOf"):
        alternatives = schema.get(word)
        if isinstance(alternatives, list) and alternatives:
            return frozenset().union(*(_types(one) for one in alternatives if isinstance(one, Mapping)))
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        return frozenset(_type_of(value) for value in values) or _ALL_TYPES
    return _ALL_TYPES


def _type_of(value: Any) -> str:
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (dict, "object")):
        if isinstance(value, kind):
            return name
    return "null" if value is None else "array"


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def as_json(text: str, types: Sequence[str] | frozenset[str]) -> str:
    """What a model wrote for a value of one of these types; a string where it is none of the others."""
    plain = text.strip()
    plain = _PYTHON_WORDS.get(plain, plain)
    try:
        value = json.loads(plain, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    kind = _type_of(value)
    fits = kind in types or (kind == "integer" and "number" in types)
    if _STRING in types and (kind == _STRING or not fits) and types != _ALL_TYPES:
        return json.dumps(text, ensure_ascii=False)
    return plain
