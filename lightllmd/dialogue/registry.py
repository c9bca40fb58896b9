"""The formats by name, and which one a chat template writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lightllmd.dialogue.formats import elements, gemma, harmony, mistral, named, pythonic
from lightllmd.dialogue.formats.bare import PYTHON_TAG, BareParser
from lightllmd.dialogue.formats.elements import ElementMarks, ElementParser
from lightllmd.dialogue.formats.gemma import GemmaParser
from lightllmd.dialogue.formats.harmony import HarmonyParser
from lightllmd.dialogue.formats.mistral import MistralParser
from lightllmd.dialogue.formats.named import NamedMarks, NamedParser
from lightllmd.dialogue.formats.pythonic import PythonicParser
from lightllmd.dialogue.formats.tagged import TaggedParser
from lightllmd.dialogue.grammar import CallSyntax, GrammarWriter, HarmonyWriter
from lightllmd.dialogue.parser import MarkParser, Parser
from lightllmd.dialogue.tools import Tool

Think = tuple[str, str]  # what reasoning stands between


@dataclass(frozen=True)
class Opening:
    """What a parser has to know of the request and its prompt."""

    tools: Sequence[Tool]  # that may be called; empty: no calls are looked for
    think: Think | None = None  # None: reasoning is not told apart
    inside: bool = False  # the prompt ends within reasoning


@dataclass(frozen=True)
class Format:
    """One way of writing calls."""

    name: str
    written: str  # a pattern that is found in the source of a template that writes it
    open: Callable[[Opening], Parser]
    syntax: CallSyntax
    # Texts that may be tokens of their own, and special ones, and that the parser has to see all the same.
    marks: frozenset[str] = field(default_factory=frozenset)
    think: Think | None = None  # of the format's own; None: what the template shows
    writer: type[GrammarWriter] = GrammarWriter
    always: bool = False  # an answer without calls has to be parsed, too

    def parser(self, opening: Opening) -> Parser:
        """For one sequence."""
        return self.open(opening) if opening.tools or self.always else ThinkParser(opening)


class ThinkParser(MarkParser):
    """Of an answer that calls nothing."""

    def __init__(self, opening: Opening) -> None:
        super().__init__([], think=opening.think, inside=opening.inside)


def _tagged(
    name: str,
    written: str,
    marks: tuple[str, str],
    keys: tuple[str, str] = ("name", "arguments"),
    syntax: CallSyntax | None = None,
) -> Format:
    """`keys`: of an object's name and arguments."""
    opening_mark, close = marks

    def parser(opening: Opening) -> Parser:
        named = dict.fromkeys([keys[1], "arguments", "parameters"])
        return TaggedParser(
            opening_mark, close, think=opening.think, inside=opening.inside, names=keys[:1], arguments=tuple(named)
        )

    head = f'{{"{keys[0]}": "{{name}}", "{keys[1]}": '
    listed = CallSyntax(head, "}", f"{opening_mark}[", ", ", f"]{close}")
    return Format(name, written, parser, syntax or listed, frozenset({opening_mark, close} - {""}))


def _named(name: str, written: str, marks: NamedMarks, syntax: CallSyntax) -> Format:
    def parser(opening: Opening) -> Parser:
        return NamedParser(marks, think=opening.think, inside=opening.inside)

    return Format(name, written, parser, syntax, marks.all)


def _elements(
    name: str, written: str, marks: ElementMarks, syntax: CallSyntax, tokens: frozenset[str] = frozenset()
) -> Format:
    """`tokens`: parts of marks that are tokens."""

    def parser(opening: Opening) -> Parser:
        schemas = {tool.name: tool.schema for tool in opening.tools}
        return ElementParser(marks, schemas, think=opening.think, inside=opening.inside)

    return Format(name, written, parser, syntax, marks.all | tokens)


def _mistral(opening: Opening) -> Parser:
    return MistralParser(think=opening.think, inside=opening.inside)


def _bare(opening: Opening) -> Parser:
    return BareParser([tool.name for tool in opening.tools], think=opening.think, inside=opening.inside)


def _pythonic(opening: Opening) -> Parser:
    return PythonicParser([tool.name for tool in opening.tools], think=opening.think, inside=opening.inside)


def _gemma(opening: Opening) -> Parser:
    return GemmaParser(think=opening.think, inside=opening.inside)


def _harmony(opening: Opening) -> Parser:
    return HarmonyParser(calls=bool(opening.tools), apart=opening.think is not None)


HERMES = _tagged(
    "hermes",
    r"<tool_call>",
    ("<tool_call>", "</tool_call>"),
    syntax=CallSyntax('<tool_call>\n{"name": "{name}", "arguments": ', "}\n</tool_call>", between="\n"),
)
_DEEPSEEK, _KIMI, _MINIMAX, _DSML = named.DEEPSEEK, named.KIMI, elements.MINIMAX, elements.DEEPSEEK_DSML

# In the order in which they are looked for in a template: what has more marks of its own comes first.
_ALL = (
    Format(
        "harmony",
        r"<\|channel\|>[\s\S]*<\|message\|>",
        _harmony,
        CallSyntax("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>", several=False),
        harmony.MARKS,
        think=(harmony.CHANNEL, harmony.END),
        writer=HarmonyWriter,
        always=True,
    ),
    Format(
        "gemma4",
        r"<\|tool_call>",
        _gemma,
        CallSyntax(gemma.OPEN + "call:{name}", gemma.CLOSE, style="gemma", excludes=(gemma.OPEN, gemma.CLOSE)),
        gemma.MARKS,
    ),
    _elements(
        "deepseek_v32",
        elements.DSML,
        _DSML,
        CallSyntax(
            _DSML.open + "{name}" + _DSML.name_end + "\n",
            _DSML.close,
            _DSML.around[0] + "\n",
            "\n",
            "\n" + _DSML.around[1],
            style="deepseek_xml",
            excludes=(_DSML.value_end,),
        ),
        frozenset({elements.DSML}),
    ),
    _named(
        "deepseek_v31",
        r"<｜tool▁sep｜>(?![\s\S]*```json)",
        _DEEPSEEK,
        CallSyntax(
            _DEEPSEEK.open + "{name}" + _DEEPSEEK.separator,
            _DEEPSEEK.close,
            _DEEPSEEK.around[0],
            "",
            _DEEPSEEK.around[1],
        ),
    ),
    _named(
        "deepseek_v3",
        r"<｜tool▁sep｜>",
        _DEEPSEEK,
        CallSyntax(
            f"{_DEEPSEEK.open}function{_DEEPSEEK.separator}{{name}}\n```json\n",
            f"\n```{_DEEPSEEK.close}",
            _DEEPSEEK.around[0],
            "\n",
            _DEEPSEEK.around[1],
        ),
    ),
    _named(
        "kimi_k2",
        r"<\|tool_call_argument_begin\|>",
        _KIMI,
        CallSyntax(
            f"{_KIMI.open}functions.{{name}}:{{number}}{_KIMI.separator}",
            _KIMI.close,
            _KIMI.around[0],
            "",
            _KIMI.around[1],
        ),
    ),
    _elements(
        "glm45",
        r"<arg_key>",
        elements.GLM,
        CallSyntax("<tool_call>{name}\n", "\n</tool_call>", between="\n", style="glm_xml", excludes=("</arg_value>",)),
    ),
    _elements(
        "minimax_m2",
        r"minimax:tool_call",
        _MINIMAX,
        CallSyntax(
            '<invoke name="{name}">\n',
            "</invoke>",
            "<minimax:tool_call>\n",
            "\n",
            "\n</minimax:tool_call>",
            style="minimax_xml",
            excludes=("</parameter>",),
        ),
    ),
    _elements(
        "seed_oss",
        r"seed:tool_call",
        elements.SEED,
        CallSyntax(
            "<seed:tool_call>\n<function={name}>\n",
            "\n</function>\n</seed:tool_call>",
            between="\n",
            style="qwen_xml",
            excludes=("</parameter>",),
        ),
    ),
    _elements(
        "qwen3_coder",
        r"<function=[\s\S]*<parameter=",
        elements.QWEN_CODER,
        CallSyntax(
            "<tool_call>\n<function={name}>\n",
            "\n</function>\n</tool_call>",
            between="\n",
            style="qwen_xml",
            excludes=("</parameter>",),
        ),
    ),
    Format(
        "mistral_v11",
        r"\[ARGS\]",
        _mistral,
        CallSyntax("[TOOL_CALLS]{name}[ARGS]"),
        frozenset({mistral.CALLS, mistral.ARGS, mistral.CALL_ID}),
    ),
    Format(
        "mistral",
        r"\[TOOL_CALLS\]",
        _mistral,
        CallSyntax('{"name": "{name}", "arguments": ', "}", "[TOOL_CALLS] [", ", ", "]"),
        frozenset({mistral.CALLS}),
    ),
    _tagged("phi4_mini", r"<\|/tool_call\|>|<\|/tool\|>", ("<|tool_call|>", "<|/tool_call|>")),
    _tagged("granite", r"<\|tool_call\|>", ("<|tool_call|>", "")),
    _tagged("command_r", r"<\|START_ACTION\|>", ("<|START_ACTION|>", "<|END_ACTION|>"), ("tool_name", "parameters")),
    _tagged("jamba", r"<tool_calls>", ("<tool_calls>", "</tool_calls>")),
    HERMES,
    Format(
        "pythonic",
        r"\[func_name1\(|\[func1\(|tool_call\.name \+ ['\"]\(",
        _pythonic,
        CallSyntax("{name}(", ")", "[", ", ", "]", style="pythonic"),
        frozenset({pythonic.START, pythonic.END}),
    ),
    Format(
        "llama3_json",
        r"<\|python_tag\|>|<\|python_start\|>|[\"']parameters[\"']: ",
        _bare,
        CallSyntax('{"name": "{name}", "parameters": ', "}", between="; "),
        frozenset({PYTHON_TAG, pythonic.START, pythonic.END}),
    ),
)
FORMATS: dict[str, Format] = {one.name: one for one in _ALL}
_PATTERNS = [(re.compile(one.written), one) for one in _ALL]

THINKS: tuple[Think, ...] = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>thought\n", "<channel|>"),
)


def written_format(template: str) -> Format | None:
    """That in which the template writes calls; None: in none that is known."""
    return next((one for pattern, one in _PATTERNS if pattern.search(template)), None)


def written_think(template: str) -> Think | None:
    """The marks of reasoning that stand in the template."""
    return next((think for think in THINKS if think[1] in template), None)
