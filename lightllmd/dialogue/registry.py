"""The formats by name, and which one a chat template writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lightllmd.dialogue.formats.tagged import TaggedParser
from lightllmd.dialogue.parser import Parser
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
    written: re.Pattern[str]  # found in the source of a template that writes it
    open: Callable[[Opening], Parser]
    # Texts that may be tokens of their own, and special ones, and that the parser has to see all the same.
    marks: frozenset[str] = field(default_factory=frozenset)


def _hermes(opening: Opening) -> Parser:
    return TaggedParser("<tool_call>", "</tool_call>", think=opening.think, inside=opening.inside)


HERMES = Format("hermes", re.compile(r"<tool_call>"), _hermes, frozenset({"<tool_call>", "</tool_call>"}))

# In the order in which they are looked for in a template: what has more marks of its own comes first.
FORMATS: dict[str, Format] = {one.name: one for one in (HERMES,)}

THINKS: tuple[Think, ...] = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
)


def written_format(template: str) -> Format | None:
    """That in which the template writes calls; None: in none that is known."""
    return next((one for one in FORMATS.values() if one.written.search(template)), None)


def written_think(template: str) -> Think | None:
    """The marks of reasoning that stand in the template."""
    return next((think for think in THINKS if think[1] in template), None)
