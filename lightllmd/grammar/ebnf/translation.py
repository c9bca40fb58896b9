"""What the engine gets of a client's grammar: EBNF, or a structural tag whose parts are."""

from __future__ import annotations

from typing import Any

import msgspec

from lightllmd.errors import InvalidRequest
from lightllmd.grammar.ebnf.expressions import NOTHING, Literal, alt, ebnf
from lightllmd.grammar.ebnf.json_schema import USUAL, Layout, layout, schema_grammar
from lightllmd.grammar.ebnf.reading import refusal
from lightllmd.grammar.ebnf.regex import RegexInvalid, whole
from lightllmd.grammar.native import native
from lightllmd.ipc.messages import Grammar

MAX_CHOICES = 10_000
MAX_DEPTH = 64  # of a structural tag
NAMED = "named"  # key of a schema in one: the client's name for it, for refusals
_ANY_OBJECT = {"type": "object"}


def translated(grammar: Grammar, field: str) -> Grammar:
    """Raises InvalidRequest, which names the field, within a schema the keyword by its path."""
    form = USUAL if grammar.whitespace is None else layout(grammar.whitespace, field)
    match grammar.kind:
        case "json_object":
            text = schema_grammar(_ANY_OBJECT, field, form)
        case "json_schema":
            text = schema_grammar(_decoded(grammar.text, field), field, form)
        case "regex":
            text = _pattern(grammar.text, field)
        case "choice":
            text = _choice(_decoded(grammar.text, field), field)
        case "ebnf":
            text = _plain_ebnf(grammar.text, field)
        case "structural_tag":
            tag = _with_grammars(_decoded(grammar.text, field), field, form, 0)
            return Grammar("structural_tag", msgspec.json.encode(tag).decode())
    return Grammar("ebnf", text)


def _decoded(text: str, field: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeEncodeError) as failure:
        raise refusal(field, f"should be JSON; {failure}") from None


def _pattern(pattern: str, field: str) -> str:
    try:
        expression = whole(pattern)
    except RegexInvalid as fault:
        raise refusal(field, f"{fault}; got {pattern!r:.80}") from None
    if expression == NOTHING:
        raise refusal(field, f"no text matches; got {pattern!r:.80}")
    return ebnf({"root": expression})


def _choice(choices: Any, field: str) -> str:
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) for one in choices):
        raise refusal(field, "should be a list of texts, at least one")
    if len(choices) > MAX_CHOICES:
        raise refusal(field, f"has {len(choices)} choices, more than {MAX_CHOICES}")
    for at, choice in enumerate(choices):
        try:
            choice.encode()
        except UnicodeEncodeError:
            raise refusal(f"{field}.{at}", "a lone surrogate is no character") from None
    return ebnf({"root": alt(map(Literal, choices))})


def _plain_ebnf(text: str, field: str) -> str:
    """A grammar without ``::=`` is one in Lark's language, as vLLM has it."""
    if "::=" in text or not text.strip():
        return text
    try:
        return str(native().Grammar.from_lark(text, None, [], []).to_string())
    except (RuntimeError, ValueError, TypeError) as fault:
        words = " ".join(str(fault).split())
        raise refusal(field, f"{words:.200}; got {text!r:.80}") from None


def _with_grammars(tag: Any, field: str, form: Layout, depth: int) -> Any:
    """A structural tag, old or new, with a grammar in the place of each schema and pattern."""
    if depth > MAX_DEPTH:
        raise refusal(field, f"nests deeper than {MAX_DEPTH} levels")
    if isinstance(tag, list):
        return [_with_grammars(one, f"{field}.{at}", form, depth + 1) for at, one in enumerate(tag)]
    if not isinstance(tag, dict):
        return tag
    if depth == 0 and "structures" in tag:
        return _of_structures(tag, field, form)
    match tag.get("type"):
        case "json_schema" if "json_schema" in tag:
            named = tag.get(NAMED)
            text = schema_grammar(tag["json_schema"], named if isinstance(named, str) else f"{field}.json_schema", form)
            if tag.get("style", "json") != "json":  # arguments of calls that are not written as JSON
                return {name: one for name, one in tag.items() if name != NAMED}
        case "constraint":
            return _constraint(tag, field)
        case "regex" if isinstance(tag.get("pattern"), str):
            text = _pattern(tag["pattern"], f"{field}.pattern")
        case "grammar" if isinstance(tag.get("grammar"), str):
            text = _plain_ebnf(tag["grammar"], f"{field}.grammar")
        case _:
            return {name: _with_grammars(one, f"{field}.{name}", form, depth + 1) for name, one in tag.items()}
    return {"type": "grammar", "grammar": text}


def _constraint(tag: dict[str, Any], field: str) -> dict[str, Any]:
    """Of a client's own one, which is a part of what its output has to be: see `as_part`."""
    try:
        grammar = msgspec.convert(tag.get("constraint"), Grammar)
        named = msgspec.convert(tag.get(NAMED), str)
    except msgspec.ValidationError as failure:
        raise refusal(field, f"should be a constraint; {failure}") from None
    if grammar.kind == "structural_tag":
        raise refusal(named, "a structural tag is no part of another one")
    return {"type": "grammar", "grammar": translated(grammar, named).text}


def as_part(grammar: Grammar, field: str) -> dict[str, Any]:
    """Any grammar but a structural tag as a part of one. `field`: the client's name for it."""
    return {"type": "constraint", "constraint": msgspec.to_builtins(grammar), NAMED: field}


def _of_structures(tag: dict[str, Any], field: str, form: Layout) -> dict[str, Any]:
    """Of vLLM's and OpenAI-compatible servers' old form: `structures` of begin, schema and end, and `triggers`."""
    structures, triggers = tag["structures"], tag.get("triggers")
    if not isinstance(structures, list) or not all(isinstance(one, dict) for one in structures):
        raise refusal(f"{field}.structures", "should be a list of objects")
    if not isinstance(triggers, list) or not all(isinstance(one, str) for one in triggers):
        raise refusal(f"{field}.triggers", "should be a list of texts")
    tags = []
    for at, one in enumerate(structures):
        place = f"{field}.structures.{at}"
        for name in ("begin", "end"):
            if not isinstance(one.get(name), str):
                raise InvalidRequest(f"{place}.{name}: should be a text", param=f"{place}.{name}")
        text = schema_grammar(one.get("schema", True), f"{place}.schema", form)
        content = {"type": "grammar", "grammar": text}
        tags.append({"type": "tag", "begin": one["begin"], "content": content, "end": one["end"]})
    return {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": triggers, "tags": tags}}
