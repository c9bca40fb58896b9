"""Outputs of models in each format, as recorded or as their makers document them, and broken ones made of these."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

from lightllmd.dialogue.registry import FORMATS
from lightllmd.dialogue.tools import Tool

TOOLS = [
    Tool(
        "get_weather",
        "The weather",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "exact": {"type": "boolean"},
                "where": {"type": ["object", "null"]},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["city"],
        },
    ),
    Tool("now"),
]
CITY = 'Zürich "</tool_call>" <think> [x]\\ 雨'
FIRST: dict[str, Any] = {
    "city": CITY,
    "days": 3,
    "exact": True,
    "where": {"a": [1, {"b": None}]},
    "tags": ["x", "y, z"],
}
SECOND: dict[str, Any] = {}
_ONE, _TWO = json.dumps(FIRST, ensure_ascii=False), "{}"
_ESCAPED = json.dumps(FIRST)
_PYTHON = (
    "[get_weather(city='Z\\xfcrich \"</tool_call>\" <think> [x]\\\\ \\u96e8', days=3, exact=True, "
    "where={'a': [1, {'b': None}]}, tags=['x', \"y, z\"]), now()]"
)
_QWEN = (
    f"<tool_call>\n<function=get_weather>\n<parameter=city>\n{CITY}\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    '<parameter=exact>\nTrue\n</parameter>\n<parameter=where>\n{"a": [1, {"b": null}]}\n</parameter>\n'
    '<parameter=tags>\n["x", "y, z"]\n</parameter>\n</function>\n</tool_call>\n'
    "<tool_call>\n<function=now>\n</function>\n</tool_call>"
)
_SEED = re.sub(r"(<parameter=\w+>)\n(.*)\n</parameter>", r"\1\2</parameter>", _QWEN)
_SEED = re.sub(r"(?m)^(</?)tool_call>", r"\1seed:tool_call>", _SEED)
_GLM = (
    f"<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>{CITY}</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>3</arg_value>\n<arg_key>exact</arg_key>\n<arg_value>true</arg_value>\n<arg_key>where</arg_key>\n"
    '<arg_value>{"a": [1, {"b": null}]}</arg_value>\n<arg_key>tags</arg_key>\n<arg_value>["x", "y, z"]</arg_value>\n'
    "</tool_call>\n<tool_call>now\n</tool_call>"
)
_MINIMAX = (
    f'<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">{CITY}</parameter>\n'
    '<parameter name="days">3</parameter>\n<parameter name="exact">true</parameter>\n'
    '<parameter name="where">{"a": [1, {"b": null}]}</parameter>\n<parameter name="tags">["x", "y, z"]</parameter>\n'
    '</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>'
)
_DEEPSEEK = (
    f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{_ONE}\n```"
    f"<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{_TWO}\n```<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>"
)
_DSML = (
    f'<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
    f'<｜DSML｜parameter name="city" string="true">{CITY}</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="exact" string="false">true</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="where" string="false">{"a": [1, {"b": null}]}</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="tags" string="false">["x", "y, z"]</｜DSML｜parameter>\n'
    '</｜DSML｜invoke>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
)
_GEMMA = (
    f'<|tool_call>call:get_weather{{city:<|"|>{CITY}<|"|>,days:3,exact:true,where:{{a:[1,{{b:null}}]}},'
    'tags:[<|"|>x<|"|>,<|"|>y, z<|"|>]}<tool_call|><|tool_call>call:now{}<tool_call|>'
)
_HARMONY = (
    "<|channel|>analysis<|message|>We need <b>both</b>.<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
    "<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    f"{_ONE}<|call|><|start|>assistant to=functions.now<|channel|>commentary json<|message|>{_TWO}<|call|>"
)


def _listed(name: str = "name", arguments: str = "arguments") -> str:
    return f'[{{"{name}": "get_weather", "{arguments}": {_ONE}}}, {{"{name}": "now", "{arguments}": {_TWO}}}]'


# By format: the calls that are in all of them, FIRST of get_weather and SECOND of now, with text around.
CALLS: dict[str, list[str]] = {
    "hermes": [
        f'I look.\n<tool_call>\n{{"name": "get_weather", "arguments": {_ONE}}}\n</tool_call>\n'
        f'<tool_call>\n{{"name": "now", "arguments": {_TWO}}}\n</tool_call>',
        f'I look.<tool_call>{{"arguments": {_ONE}, "name": "get_weather"}}</tool_call><tool_call>{{"name": "now"}}',
        f"I look. <tool_call>{_listed(arguments='parameters')}</tool_call>",
        f'I look.<tool_call>{{"name": "get_weather", "arguments": {json.dumps(_ESCAPED)}}}</tool_call>'
        '<tool_call>{"name": "now", "arguments": null}</tool_call>',
    ],
    "mistral": [f"I look.[TOOL_CALLS] {_listed()}", f"I look.[TOOL_CALLS]{_listed()}"],
    "mistral_v11": [
        f"I look.[TOOL_CALLS]get_weather[ARGS]{_ONE}[TOOL_CALLS]now[ARGS]{_TWO}",
        f"I look.[TOOL_CALLS]get_weather[CALL_ID]Ab3xY9kLm[ARGS]{_ONE}[TOOL_CALLS]now{_TWO}",
    ],
    "deepseek_v3": [f"I look.\n{_DEEPSEEK}"],
    "gemma4": [f"I look.{_GEMMA}", "I look.\n" + _GEMMA.replace(",", ", ").replace("y,  z", "y, z")],
    "deepseek_v32": [f"I look.\n\n{_DSML}"],
    "deepseek_v31": [
        f"I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{_ONE}<｜tool▁call▁end｜>"
        f"<｜tool▁call▁begin｜>now<｜tool▁sep｜>{_TWO}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ],
    "kimi_k2": [
        "I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f"{_ONE}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{_TWO}"
        "<|tool_call_end|><|tool_calls_section_end|>"
    ],
    "glm45": [f"I look.\n{_GLM}", "I look." + _GLM.replace("\n<arg", "<arg").replace("\n</tool_call>", "</tool_call>")],
    "qwen3_coder": [f"I look.\n{_QWEN}"],
    "seed_oss": [f"I look.\n{_SEED}"],
    "minimax_m2": [f"I look.\n{_MINIMAX}"],
    "granite": [f"I look.<|tool_call|>{_listed()}"],
    "phi4_mini": [f"I look.<|tool_call|>{_listed()}<|/tool_call|>"],
    "command_r": [f"I look.<|START_ACTION|>{_listed('tool_name', 'parameters')}<|END_ACTION|>"],
    "jamba": [f"I look.<tool_calls>{_listed()}</tool_calls>"],
    "llama3_json": [
        f'{{"name": "get_weather", "parameters": {_ONE}}}; {{"name": "now", "parameters": {_TWO}}}',
        f'<|python_tag|>{{"name": "get_weather", "parameters": {_ONE}}}\n{{"name": "now", "parameters": {_TWO}}}',
        f'{{"type": "function", "parameters": {_ONE}, "name": "get_weather"}}, {{"name": "now", "parameters": {_TWO}}}',
    ],
    "pythonic": [_PYTHON, f"<|python_start|>{_PYTHON}<|python_end|>"],
    "harmony": [_HARMONY],
}
TEXTS = [
    "Hello, it's <b>7</b> o'clock.\n\n1. one  \n2. two <tool\n",
    '{"name": "Bob", "age": 3}',
    "[1, 2, 3] and [x](http://a.b)",
    "",
    "  \n ",
    "<",
    "x" * 300 + " " * 100 + "y",
]


def outputs(name: str, think: tuple[str, str] | None) -> list[str]:
    """Whole ones, reasoning before some of them."""
    found = [*CALLS[name], *TEXTS]
    if think is not None and name != "harmony":
        found += [f"{think[0]}\nHm, <a> b.\n{think[1]}\n\n{text}" for text in CALLS[name]]
    return found


def broken(name: str, think: tuple[str, str] | None, count: int, seed: int = 0) -> Iterator[str]:
    """Recorded ones in which characters, marks and pieces are lost, doubled, swapped or strange."""
    rng = random.Random(f"{name} {seed}")
    whole = [text for text in outputs(name, think) if text]
    pieces = [*"{}\"\\<>[](),:\n ='雨", "null", "</", "\\u12", *sorted(FORMATS[name].marks)]
    for _ in range(count):
        text = rng.choice(whole)
        for _ in range(rng.randint(1, 4)):
            at, end = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
            end = min(end, at + rng.randint(0, 40))
            kind = rng.randrange(5)
            if kind == 0:
                text = text[:at] + text[end:]
            elif kind == 1:
                text = text[:at] + text[at:end] * 2 + text[end:]
            elif kind == 2:
                text = text[:at] + rng.choice(pieces) + text[at:]
            elif kind == 3:
                text = text[:at]
            else:
                other = rng.choice(whole)
                text = text[:at] + other[rng.randint(0, len(other)) :]
        yield text


def random_tools(count: int, rng: random.Random) -> list[Tool]:
    """Of nested schemas; no string or list of them is long."""

    def schema(depth: int) -> dict[str, Any]:
        kinds = ["string", "integer", "boolean", "number", "enum", "null", "pattern"]
        kind = rng.choice([*kinds, "object", "array"] if depth else kinds)
        if kind == "object":
            names = rng.sample("abcdefg", rng.randint(0, 4))
            chosen = [name for name in names if rng.random() < 0.6]
            properties = {name: schema(depth - 1) for name in names}
            return {"type": "object", "properties": properties, "required": chosen, "additionalProperties": False}
        if kind == "array":
            return {"type": "array", "items": schema(depth - 1), "minItems": rng.randint(0, 2), "maxItems": 4}
        if kind == "enum":
            return {"enum": rng.sample(["x", "y y", 3, True, None], 3)}
        if kind == "pattern":
            return {"type": "string", "pattern": "^[a-c]{1,3}-[0-9]+$"}
        return {"type": kind} | ({"maxLength": 12} if kind == "string" else {})

    tools = []
    while len(tools) < count:
        made = schema(3)
        if made.get("type") == "object":
            tools.append(Tool(f"tool_{len(tools)}", "does something", made))
    return tools
