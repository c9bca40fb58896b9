"""What a grammar of calls allows is read back by the parser of its format, and is valid: random walks through masks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

from dialogue_outputs import TOOLS, random_tools
from lightllmd.dialogue.conventions import Conventions
from lightllmd.dialogue.events import CallArguments, CallBegun, Content, Reasoning, merged
from lightllmd.dialogue.registry import FORMATS, Opening
from lightllmd.dialogue.tools import Dialogue, Tool, ToolChoice
from lightllmd.errors import InvalidRequest
from lightllmd.grammar.compiler import GrammarCompiler
from lightllmd.grammar.ebnf.translation import translated
from lightllmd.grammar.native import native
from lightllmd.requests.constraint import Constraint
from lightllmd.text.chat_template import ChatTemplate

EOS = 256
CLOSERS = frozenset(b'"}],:)')
TEMPLATES = {  # what a template of the format has of it
    "harmony": "<|channel|>commentary<|message|>",
    "gemma4": "<|tool_call>call:",
    "deepseek_v32": '<｜DSML｜invoke name="$TOOL_NAME">',
    "deepseek_v31": "<｜tool▁sep｜>",
    "deepseek_v3": "<｜tool▁sep｜>```json",
    "kimi_k2": "<|tool_call_argument_begin|>",
    "glm45": "<tool_call><arg_key>",
    "minimax_m2": "<minimax:tool_call>",
    "seed_oss": "<seed:tool_call><function=x><parameter=y>",
    "qwen3_coder": "<tool_call><function=x><parameter=y>",
    "mistral_v11": "[TOOL_CALLS]name[ARGS]",
    "mistral": "[TOOL_CALLS] [",
    "phi4_mini": "<|tool_call|><|/tool_call|>",
    "granite": "<|tool_call|>",
    "command_r": "<|START_ACTION|>",
    "jamba": "<tool_calls>",
    "hermes": "<tool_call>",
    "pythonic": "[func_name1(a=1)]",
    "llama3_json": '{"name": n, "parameters": p}',
}


class Walk:
    """Texts that a constraint allows, of a vocabulary of bytes, a few words and the format's marks."""

    def __init__(self, name: str, special: bool) -> None:
        """`special`: the marks are special tokens, which no text stands for."""
        marks = sorted(FORMATS[name].marks)
        self.names = dict(enumerate(marks, EOS + 1))
        words: list[bytes | None] = [mark.encode() for mark in marks]
        self.special = {mark: number for number, mark in self.names.items()} if special else {}
        vocabulary = [*(bytes([byte]) for byte in range(256)), None, *([None] * len(marks) if special else words)]
        self.compiler = GrammarCompiler(vocabulary, len(vocabulary), [EOS])

    def compiled(self, constraint: Constraint) -> Any:
        return self.compiler.compile(translated(constraint.grammar, constraint.field))

    def texts(self, constraint: Constraint, count: int, most: int = 600) -> Iterator[str]:
        """Those that end within `most` tokens."""
        compiled = self.compiled(constraint)
        for seed in range(count):
            matcher = native().GrammarMatcher(compiled, None, False, -1, None)
            rng, bits = random.Random(seed), np.zeros((1, self.compiler.words), np.int32)
            said: list[int] = []
            while len(said) < most:
                matcher.fill_next_token_bitmask(bits, 0, False)
                mask = np.unpackbits(bits.view(np.uint8), bitorder="little")[: self.compiler.vocab_size]
                allowed = np.flatnonzero(mask).tolist()
                assert allowed, self.text(said)
                if EOS in allowed and rng.random() < 0.7:
                    yield self.text(said)
                    break
                closing = [token for token in allowed if token > EOS or token in CLOSERS]
                plain = [token for token in allowed if 32 <= token < 127] or allowed
                token = rng.choice(closing if closing and rng.random() < 0.6 else plain)
                if token == EOS:
                    continue
                assert matcher.accept_token(token, False)
                said.append(token)

    def text(self, tokens: list[int]) -> str:
        parts = [self.names[token].encode() if token > EOS else bytes([token]) for token in tokens]
        return b"".join(parts).decode("utf-8", "replace")


def conventions(name: str, walk: Walk, think: bool = False) -> Conventions:
    source = "{% for tool in tools %}{% endfor %}" + "{# " + TEMPLATES[name] + (" </think>" if think else "") + " #}"
    made = Conventions(ChatTemplate(source), special=walk.special)
    assert made.format.name == name
    return made


def constraint(made: Conventions, dialogue: Dialogue, prompt_end: str = "") -> Constraint:
    found = made.prepare([], {}, dialogue).constraint(prompt_end, None)
    assert found is not None
    return found


def check(name: str, text: str, tools: list[Tool], most: int, *, think: bool = False, inside: bool = False) -> int:
    """The number of calls, all of which are valid."""
    parser = FORMATS[name].parser(Opening(tools, ("<think>", "</think>") if think else None, inside))
    events = merged(parser.feed(text) + parser.end())
    names = [event.name for event in events if isinstance(event, CallBegun)]
    arguments = ["" for _ in names]
    for event in events:
        if isinstance(event, CallArguments):
            arguments[event.index] += event.text
    assert 1 <= len(names) <= most, text
    if name != "harmony":  # which may say something before it calls
        assert not any(isinstance(event, Content) for event in events), text
        assert think or not any(isinstance(event, Reasoning) for event in events)
    schemas = {tool.name: tool.schema for tool in tools}
    for called, told in zip(names, arguments, strict=True):
        jsonschema.validate(json.loads(told), schemas[called])
    return len(names)


def marked(name: str) -> list[bool]:
    """Whether marks are special tokens in some tokenizers: those of harmony in all; of formats in elements in none."""
    return [True] if name == "harmony" else [False] if "xml" in FORMATS[name].syntax.style else [False, True]


@pytest.mark.parametrize(("name", "special"), [(name, special) for name in FORMATS for special in marked(name)])
def test_required_calls_are_read_back_and_valid(name, special):
    walk = Walk(name, special)
    made = conventions(name, walk)
    several = 0
    for parallel in (True, False):
        dialogue = Dialogue(TOOLS, ToolChoice("required"), parallel)
        for text in walk.texts(constraint(made, dialogue), 6):
            several = max(several, check(name, text, TOOLS, 99 if parallel else 1))
    assert several >= 1
    named = Dialogue(TOOLS, ToolChoice("required", ("now",)), parallel=False)
    for text in walk.texts(constraint(made, named), 2):
        check(name, text, [TOOLS[1]], 1)


@pytest.mark.parametrize("name", ["hermes", "mistral_v11", "deepseek_v31"])
@pytest.mark.parametrize("end", ["<think>\n", ""], ids=["begun", "not begun"])
def test_reasoning_may_stand_before_required_calls(name, end):
    walk = Walk(name, False)
    made = conventions(name, walk, think=True)
    found = constraint(made, Dialogue(TOOLS, ToolChoice("required")), end)
    matcher = native().GrammarMatcher(walk.compiled(found), None, False, -1, None)
    thought = "I <b> think.</think>\n\n" if end else "<think>I <b> think.</think>\n\n"
    assert matcher.accept_string(thought.encode(), False)
    assert not matcher.accept_string(b"Hello", False)


def test_strict_tools_leave_the_text_free_and_their_calls_valid():
    strict = [Tool(tool.name, tool.description, tool.parameters, strict=tool.name == "get_weather") for tool in TOOLS]
    for name in FORMATS:
        special = name == "harmony"
        walk = Walk(name, special)
        found = conventions(name, walk).prepare([], {}, Dialogue(strict)).constraint("", None)
        compiled = walk.compiled(found)

        def accepted(text: str, compiled=compiled, walk=walk) -> bool:
            matcher = native().GrammarMatcher(compiled, None, False, -1, None)
            tokens = [walk.special[text]] if text in walk.special else text.encode()
            return all(matcher.accept_token(token, False) for token in tokens)

        if name != "harmony":
            assert accepted("Hello <b>you</b>, [x] {y}."), name
    made = conventions("hermes", walk := Walk("hermes", False))
    compiled = walk.compiled(constraint(made, Dialogue(strict)))
    for body, fits in (
        ('{"name": "get_weather", "arguments": {"city": "x"}}', True),
        ('{"name": "get_weather", "arguments": {"days": 1}}', False),
        ('{"name": "now", "arguments": {"any": [1]}}', True),
        ('{"name": "other", "arguments": {}}', False),
    ):
        matcher = native().GrammarMatcher(compiled, None, False, -1, None)
        assert matcher.accept_string(f"I look. <tool_call>\n{body}\n</tool_call>, so".encode(), False) == fits, body


def test_a_constrained_answer_may_call_a_tool_or_be_thought_of_before():
    walk = Walk("hermes", False)
    made = conventions("hermes", walk, think=True)
    schema = json.dumps({"properties": {"a": {"type": "integer"}}})
    for asked, said in (
        (Constraint("json_schema", schema, "response_format"), '{"a": 1}'),
        (Constraint("regex", "[ab]+", "guided_regex"), "abba"),
        (Constraint("choice", '["yes", "no"]', "guided_choice"), "no"),
        (Constraint("ebnf", 'root ::= "x" | "y"', "guided_grammar"), "y"),
        (Constraint("ebnf", 'start: "x" | "y"', "guided_grammar"), "y"),
        (Constraint("json_object", "", "response_format"), '{"b": [null]}'),
    ):
        found = made.prepare([], {}, Dialogue(TOOLS)).constraint("<think>\n", asked)
        compiled = walk.compiled(found)
        for text, fits in (
            (f"Hm.</think>\n\n{said}", True),
            ('Hm.</think>\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', True),
            ("Hm.</think>\n\nHello", False),
            (said, True),  # still reasoning
        ):
            matcher = native().GrammarMatcher(compiled, None, False, -1, None)
            assert matcher.accept_string(text.encode(), False) == fits, (asked, text)
        assert found.field == asked.field
        assert conventions("hermes", walk).prepare([], {}, Dialogue()).constraint("", asked) == asked
    bad = made.prepare([], {}, Dialogue()).constraint("", Constraint("regex", "(", "guided_regex"))
    with pytest.raises(InvalidRequest, match=r"^guided_regex:"):
        walk.compiled(bad)


@pytest.mark.parametrize("name", ["hermes", "qwen3_coder", "pythonic"])
def test_a_schema_that_can_t_be_is_refused_by_the_tool_s_name(name):
    bad = {"type": "object", "properties": {"a": {"type": "string", "format": "no such"}, "b": {"type": 5}}}
    tools = [TOOLS[1], Tool("f", None, bad, field="tools.1.function")]
    walk = Walk(name, False)
    found = constraint(conventions(name, walk), Dialogue(tools, ToolChoice("required")))
    with pytest.raises(InvalidRequest, match=r"^tools\.1\.function\.parameters\.properties\.b"):
        walk.compiled(found)


def test_a_hundred_tools_of_any_schemas_called_as_required():
    tools = random_tools(100, random.Random(3))
    walk = Walk("hermes", False)
    found = constraint(conventions("hermes", walk), Dialogue(tools, ToolChoice("required"), parallel=False))
    assert sum(check("hermes", text, tools, 1) for text in walk.texts(found, 40)) >= 20
