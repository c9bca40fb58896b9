"""Strings as JSON writes them, the formats that are enforced, and keys that differ from given ones."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from lightllmd.grammar.ebnf.expressions import (
    EMPTY,
    NOTHING,
    Chars,
    Expression,
    Juxtaposed,
    Literal,
    OneOf,
    Reference,
    Repeat,
    alt,
    both,
    char_set,
    chars,
    complement,
    repeat,
    seq,
)
from lightllmd.grammar.ebnf.regex import ANY, whole

_MAX_NODES = 12  # of a trie of names
_CUT = "cut"
CHARACTER = Reference("character")  # one of a string, escaped or not
ESCAPE = Reference("escape")  # one of a string, escaped
_SHORT = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
# What JSON writes as it is. A DEL may be, too, but is hardly meant.
PLAIN = complement(chars([(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F)]).ranges)
_HEX = chars([(48, 57), (65, 70), (97, 102)])


def escape_rule() -> Expression:
    """What `ESCAPE` stands for; \\u of a surrogate only with its other half."""
    return alt(
        [
            seq(Literal("\\"), char_set('"\\/bfnrt')),
            seq(Literal("\\u"), chars([(48, 57), (65, 67), (69, 70), (97, 99), (101, 102)]), _HEX, _HEX, _HEX),
            seq(Literal("\\u"), char_set("dD"), chars([(48, 55)]), _HEX, _HEX),
            seq(
                Literal("\\u"),
                char_set("dD"),
                char_set("89abAB"),
                *(_HEX, _HEX),
                Literal("\\u"),
                char_set("dD"),
                chars([(67, 70), (99, 102)]),
                *(_HEX, _HEX),
            ),
        ]
    )


def character_rule() -> Expression:
    """What `CHARACTER` stands for: as it is, or escaped."""
    return alt([PLAIN, ESCAPE])


def _run(plain: Expression, escaped: Expression) -> Expression:
    """Any number of characters, as they are or escaped. Alternatives that are repeated would be rules of their own to
    xgrammar, which a token of several characters leaves, so that it tries all tokens at each place of a string: 35 ms
    instead of 0.3 for a vocabulary of 128,000."""
    return seq(repeat(plain, 0, None), _from_escape(plain, escaped, 0))


def _from_escape(plain: Expression, escaped: Expression, least: int) -> Expression:
    return repeat(seq(escaped, repeat(plain, 0, None)), least, None)


CHARACTERS = _run(PLAIN, ESCAPE)  # of a string, as many as there are


def counted(plain: Chars, escaped: Expression, least: int, most: int | None) -> Expression:
    """Characters, so many of them; those that need no counting, and one that has to be there, may be `escaped`.

    Where they are counted they are `plain`. xgrammar counts those of one set as fast as it matches them; of plain or
    escaped ones, however that is said, it makes a state for each count, and looks at each token of the vocabulary in
    each of them: for 200 characters and 40,000 tokens that takes 3 s and 14 MB instead of 7 ms and 70 kB."""
    if most is not None:
        return repeat(plain, least, most)
    if least == 1 and escaped != NOTHING:
        begun = seq(repeat(plain, 1, None), _from_escape(plain, escaped, 0))
        return alt([begun, _from_escape(plain, escaped, 1)])
    return seq(repeat(plain, least, least), _run(plain, escaped))


def quoted(text: Expression) -> Expression:
    """The JSON string of a text that `text` matches."""
    return seq(Literal('"'), _in_json(text), Literal('"'))


def _in_json(expression: Expression) -> Expression:
    match expression:
        case Literal(text):
            return seq(*(_in_json(char_set(one)) for one in text))
        case Chars():
            return CHARACTER if expression == ANY else _escaped(expression)
        case Juxtaposed(parts):
            return seq(*map(_in_json, parts))
        case OneOf(parts):
            return alt(map(_in_json, parts))
        case Repeat(part, least, most):
            plain = both(part, PLAIN) if isinstance(part, Chars) else chars([])
            if not isinstance(part, Chars) or not plain.ranges:
                return repeat(_in_json(part), least, most)
            return counted(plain, ESCAPE if part == ANY else _short(part), least, most)
    return expression


@lru_cache(1024)
def _escaped(members: Chars) -> Expression:
    """Control characters without an escape of their own only where a set has nothing else."""
    plain, short = both(members, PLAIN), _short(members)
    parts: list[Expression] = [plain] if plain.ranges else []
    if short != NOTHING:
        parts.append(short)
    if not parts:
        parts = [Literal(f"\\u{code:04x}") for low, high in members.ranges for code in range(low, high + 1)]
    return alt(parts)


def _short(members: Chars) -> Expression:
    """Those that have an escape of one letter."""
    short = [letter for char, letter in _SHORT.items() if both(members, char_set(char)).ranges]
    return seq(Literal("\\"), char_set("".join(short))) if short else NOTHING


def plain_key(text: Expression) -> Expression:
    """A key that `text` matches, without escapes, with its quotes."""
    return seq(Literal('"'), _plain(text), Literal('"'))


def _plain(expression: Expression) -> Expression:
    match expression:
        case Literal(text):
            return expression if all(both(char_set(one), PLAIN).ranges for one in text) else NOTHING
        case Chars():
            plain = both(expression, PLAIN)
            return plain if plain.ranges else NOTHING
        case Juxtaposed(parts):
            return seq(*map(_plain, parts))
        case OneOf(parts):
            return alt(kept for part in parts if (kept := _plain(part)) != NOTHING)
        case Repeat(part, least, most):
            return repeat(_plain(part), least, most)
    return expression


def key_other_than(names: Iterable[str]) -> Expression:
    """A key without escapes that is none of `names`, with its quotes. Of many names those are left out, too, that begin
    alike: where a key could still be one of the names, xgrammar tries all tokens."""
    names = {*names}
    depth = max(map(len, names), default=0)
    while depth > 1 and len({name[:size] for name in names for size in range(min(depth, len(name)))}) > _MAX_NODES:
        depth -= 1
    root: _Node = {}
    for name in sorted(names):
        node = root
        for char in name[:depth]:
            node = node.setdefault(char, {})
        node["" if len(name) <= depth else _CUT] = {}
    return seq(Literal('"'), _beside(root), Literal('"'))


_Node = dict[str, "_Node"]  # of a trie: by character; "" is where a name ends, _CUT where its rest is left out


def _beside(node: _Node) -> Expression:
    if _CUT in node:
        return NOTHING
    following = {char: inner for char, inner in node.items() if char}
    other = both(PLAIN, complement(char_set("".join(following)).ranges))
    if not node:
        return repeat(PLAIN, 0, None)
    parts = [NOTHING if "" in node else EMPTY, seq(other, repeat(PLAIN, 0, None))]
    parts += [
        seq(Literal(char), _beside(inner)) for char, inner in following.items() if both(PLAIN, char_set(char)).ranges
    ]
    return alt(part for part in parts if part != NOTHING)


# --- formats ----------------------------------------------------------------------------------------------------------

_DATE = (
    r"(?:[12]\d{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))"
    r"|(?:[12]\d(?:0[48]|[2468][048]|[13579][26])|(?:1[26]|2[048])00)-02-29)"
)
_ZONE = r"(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_TIME = rf"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{{1,6}})?{_ZONE}"
_CLOCK = r"T(?:\d{1,4}H(?:\d{1,4}M(?:\d{1,4}S)?)?|\d{1,4}M(?:\d{1,4}S)?|\d{1,4}S)"
_DAYS = r"(?:\d{1,4}Y(?:\d{1,4}M(?:\d{1,4}D)?)?|\d{1,4}M(?:\d{1,4}D)?|\d{1,4}D)"
_DURATION = rf"P(?:\d{{1,4}}W|{_CLOCK}|{_DAYS}(?:{_CLOCK})?)"
_LABEL = r"[A-Za-z][A-Za-z0-9]*(?:-[A-Za-z0-9]+)?"
_HOSTNAME = rf"{_LABEL}(?:\.{_LABEL}){{0,5}}"
_ATOM = r"[A-Za-z0-9_%+-]+"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d{2}|[1-9]?\d)"
_IPV4 = rf"{_OCTET}(?:\.{_OCTET}){{3}}"
_H = "[0-9a-fA-F]{1,4}"
_IPV6 = "|".join(
    [
        rf"(?:{_H}:){{7}}{_H}",
        rf"(?:{_H}:){{1,7}}:",
        *(rf"(?:{_H}:){{1,{7 - n}}}(?::{_H}){{1,{n}}}" for n in range(1, 7)),
        rf":(?::{_H}){{1,7}}",
        "::",
    ]
)
_ESCAPE = "%[0-9A-Fa-f]{2}"
_SEGMENT = rf"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|{_ESCAPE})*"
_QUERY = rf"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|{_ESCAPE})*"
_URI = (
    rf"[A-Za-z][A-Za-z0-9+.-]+:(?://{_HOSTNAME}(?::[1-9]\d{{0,3}})?(?:/{_SEGMENT})*|[A-Za-z0-9]{_SEGMENT}(?:/{_SEGMENT})*)"
    rf"(?:\?{_QUERY})?(?:#{_QUERY})?"
)
_POINTER = "(?:/(?:[^/~]|~[01])*)*"
_EMAIL = rf"{_ATOM}(?:\.{_ATOM}){{0,3}}@{_HOSTNAME}"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": _DURATION,
    "email": _EMAIL,
    "idn-email": _EMAIL,
    "hostname": _HOSTNAME,
    "idn-hostname": _HOSTNAME,
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "uuid": r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",
    "uri": _URI,
    "uri-reference": _URI,
    "uri-template": _URI,
    "iri": _URI,
    "iri-reference": _URI,
    "json-pointer": _POINTER,
    "relative-json-pointer": rf"(?:0|[1-9]\d{{0,5}})(?:#|{_POINTER})",
}
# Of a URI with bounds of its length: web addresses.
_WEB = r"https?://[a-z][a-z0-9]{0,15}\.[a-z]{2,8}/[A-Za-z0-9._~!$&'()*+,;=:@/-]*"
REFUSED_FORMATS = frozenset({"regex"})  # JSON Schema's own, of which no grammar is made


@lru_cache(64)
def short_format(text: Expression) -> Expression | None:
    """Of what `format_text` gave, a part whose length can be bounded."""
    return whole(_WEB) if text == format_text("uri") else None


@lru_cache(64)
def format_text(name: str) -> Expression | None:
    """The texts of a format, by the RFCs that JSON Schema names; some are left out that are not written. None: JSON
    Schema doesn't define it, so that it is an annotation."""
    pattern = _FORMATS.get(name)
    return None if pattern is None else whole(pattern)
