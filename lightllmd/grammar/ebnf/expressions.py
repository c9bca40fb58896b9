"""Expressions over characters, of which grammars are made, and how they are written in xgrammar's EBNF.

An expression that no text matches is `NOTHING`; `seq` and `alt` keep it from standing inside of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Range: TypeAlias = tuple[int, int]  # code points, both included

LAST = 0x10FFFF
_SHARING_ROUNDS = 4  # rules that are the same but for references to such
SURROGATES = (0xD800, 0xDFFF)


@dataclass(frozen=True)
class Literal:
    """A text."""

    text: str


@dataclass(frozen=True)
class Chars:
    """One character of a set: ascending ranges that don't touch."""

    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class Juxtaposed:
    """One after the other; none: the empty text."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True)
class OneOf:
    """One of them; none: no text at all."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True)
class Repeat:
    """So many times; `most` None: without a bound."""

    part: Expression
    least: int
    most: int | None


@dataclass(frozen=True)
class Reference:
    """What the rule of this name says."""

    rule: str


Expression: TypeAlias = Literal | Chars | Juxtaposed | OneOf | Repeat | Reference
EMPTY = Literal("")
NOTHING = OneOf(())


def seq(*parts: Expression) -> Expression:
    """One after the other."""
    flat: list[Expression] = []
    for part in parts:
        inner = part.parts if isinstance(part, Juxtaposed) else (part,)
        for one in inner:
            if one == NOTHING:
                return NOTHING
            if isinstance(one, Literal) and flat and isinstance(flat[-1], Literal):
                flat[-1] = Literal(flat[-1].text + one.text)
            elif one != EMPTY:
                flat.append(one)
    if len(flat) == 1:
        return flat[0]
    return Juxtaposed(tuple(flat)) if flat else EMPTY


def alt(parts: Iterable[Expression]) -> Expression:
    """One of them."""
    flat: list[Expression] = []
    simple: set[Expression] = set()
    for part in parts:
        for one in part.parts if isinstance(part, OneOf) else (part,):
            if isinstance(one, Literal | Chars | Reference):
                if one in simple:
                    continue
                simple.add(one)
            flat.append(one)
    return flat[0] if len(flat) == 1 else OneOf(tuple(flat))


def repeat(part: Expression, least: int, most: int | None) -> Expression:
    """`part` so many times."""
    if most is not None and most < least:
        return NOTHING
    if part in (NOTHING, EMPTY):
        return EMPTY if least == 0 or part == EMPTY else NOTHING
    if most == 0:
        return EMPTY
    return part if (least, most) == (1, 1) else Repeat(part, least, most)


def maybe(part: Expression) -> Expression:
    """`part` or nothing at all."""
    return repeat(part, 0, 1)


# --- sets of characters -----------------------------------------------------------------------------------------------


def chars(ranges: Iterable[Range]) -> Chars:
    """Surrogates, which no UTF-8 has, are left out."""
    merged: list[Range] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        elif low <= high:
            merged.append((low, high))
    kept: list[Range] = []
    for low, high in merged:
        below, above = (low, min(high, SURROGATES[0] - 1)), (max(low, SURROGATES[1] + 1), high)
        kept += [part for part in (below, above) if part[0] <= part[1]]
    return Chars(tuple(kept))


def complement(ranges: Sequence[Range]) -> Chars:
    """All other characters. `ranges` as those of `Chars`."""
    others, start = [], 0
    for low, high in ranges:
        others.append((start, low - 1))
        start = high + 1
    others.append((start, LAST))
    return chars(pair for pair in others if pair[0] <= pair[1])


def both(one: Chars, other: Chars) -> Chars:
    """The characters that are in both."""
    return chars((max(a, c), min(b, d)) for a, b in one.ranges for c, d in other.ranges if max(a, c) <= min(b, d))


def char_set(text: str) -> Chars:
    """Each character of `text`."""
    return chars((ord(one), ord(one)) for one in text)


# --- what matches -----------------------------------------------------------------------------------------------------


def matches(expression: Expression, text: str) -> bool:
    """Whether the whole of `text` does. In polynomial time, unlike a matcher that backtracks. Without references."""
    return len(text) in _ends(expression, text, {0})


def _ends(expression: Expression, text: str, starts: set[int]) -> set[int]:
    match expression:
        case Literal(literal):
            return {start + len(literal) for start in starts if text.startswith(literal, start)}
        case Chars(ranges):
            return {
                at + 1 for at in starts if at < len(text) and any(low <= ord(text[at]) <= high for low, high in ranges)
            }
        case Juxtaposed(parts):
            for part in parts:
                starts = _ends(part, text, starts)
            return starts
        case OneOf(parts):
            return {end for part in parts for end in _ends(part, text, starts)}
        case Repeat(part, least, most):
            for _ in range(min(least, len(text) + 1)):
                starts = _ends(part, text, starts)
            found, new = set(starts), starts
            for _ in range(len(text) if most is None else min(most - least, len(text))):
                new = _ends(part, text, new) - found
                if not new:
                    break
                found |= new
            return found
    raise TypeError("references have no text of their own")


def widths(expression: Expression) -> tuple[int, int | None]:
    """How many characters a text that matches has, least and most. Without references."""
    match expression:
        case Literal(literal):
            return len(literal), len(literal)
        case Chars():
            return 1, 1
        case Juxtaposed(parts):
            bounds = [widths(part) for part in parts]
            most = [high for _, high in bounds]
            return sum(low for low, _ in bounds), None if None in most else sum(high or 0 for high in most)
        case OneOf(parts):
            bounds = [widths(part) for part in parts]
            most = [high for _, high in bounds]
            return min((low for low, _ in bounds), default=0), None if None in most else max(
                (high or 0 for high in most), default=0
            )
        case Repeat(part, least, most_times):
            low, high = widths(part)
            return low * least, None if high is None or most_times is None else high * most_times
    raise TypeError("references have no width of their own")


# --- rules ------------------------------------------------------------------------------------------------------------


def productive(rules: Mapping[str, Expression]) -> dict[str, Expression]:
    """Without what can never end, such as an object that requires one of its own kind; a rule that has nothing else is
    `NOTHING`."""
    users: dict[str, set[str]] = {}
    for name, body in rules.items():
        for used in _references(body):
            users.setdefault(used, set()).add(name)
    ending: set[str] = set()
    line = [*rules]
    while line:
        name = line.pop()
        if name not in ending and _can_end(rules[name], ending):
            ending.add(name)
            line += users.get(name, ())
    return {
        name: _with_references(body, lambda rule: Reference(rule) if rule in ending else NOTHING)
        for name, body in rules.items()
    }


def shared(rules: Mapping[str, Expression], root: str = "root") -> dict[str, Expression]:
    """With one rule for all that say the same: xgrammar compiles each by itself."""
    kept = dict(rules)
    for _ in range(_SHARING_ROUNDS):
        first: dict[Expression, str] = {}
        same = {name: first.setdefault(body, name) for name, body in kept.items() if name != root}
        if all(name == other for name, other in same.items()):
            break
        kept = {
            name: _with_references(body, lambda rule, same=same: Reference(same.get(rule, rule)))  # type: ignore[misc]
            for name, body in kept.items()
            if same.get(name, name) == name
        }
    return kept


def _can_end(expression: Expression, ending: set[str]) -> bool:
    match expression:
        case Juxtaposed(parts):
            return all(_can_end(part, ending) for part in parts)
        case OneOf(parts):
            return any(_can_end(part, ending) for part in parts)
        case Repeat(part, least, _):
            return least == 0 or _can_end(part, ending)
        case Reference(rule):
            return rule in ending
        case Chars(ranges):
            return bool(ranges)
    return True


def _with_references(expression: Expression, referred: Callable[[str], Expression]) -> Expression:
    """With what `referred` makes of each reference, and without what matches nothing."""
    match expression:
        case Juxtaposed(parts):
            return seq(*(_with_references(part, referred) for part in parts))
        case OneOf(parts):
            return alt(kept for part in parts if (kept := _with_references(part, referred)) != NOTHING)
        case Repeat(part, least, most):
            return repeat(_with_references(part, referred), least, most)
        case Reference(rule):
            return referred(rule)
        case Chars(ranges):
            return expression if ranges else NOTHING
    return expression


def ebnf(rules: Mapping[str, Expression], root: str = "root") -> str:
    """The rules that `root` needs, as xgrammar reads them. `root` has to match something."""
    needed, line = {root: None}, [root]
    while line:
        for name in _references(rules[line.pop()]):
            if name not in needed:
                needed[name] = None
                line.append(name)
    return "".join(f"{name} ::= {_written(rules[name], False)}\n" for name in needed)


def _references(expression: Expression) -> Iterable[str]:
    match expression:
        case Juxtaposed(parts) | OneOf(parts):
            for part in parts:
                yield from _references(part)
        case Repeat(part, _, _):
            yield from _references(part)
        case Reference(rule):
            yield rule


def _written(expression: Expression, inside: bool) -> str:
    """`inside`: of something that binds tighter than `|` and juxtaposition."""
    match expression:
        case Literal(text):
            return '"' + "".join(_escaped(ord(one), '"\\') for one in text) + '"'
        case Chars(ranges):
            return _written_set(ranges)
        case Juxtaposed(parts):
            text = " ".join(_written(part, isinstance(part, OneOf)) for part in parts)
        case OneOf(parts):
            text = " | ".join(_written(part, False) for part in parts)
        case Repeat(part, least, most):
            text = f"{_written(part, not isinstance(part, Literal | Chars | Reference))}{_count(least, most)}"
            return f"({text})" if inside else text
        case Reference(rule):
            return rule
    return f"({text})" if inside else text


def _written_set(ranges: Sequence[Range]) -> str:
    """By what it is not, where that is shorter: xgrammar compiles it faster then."""
    others = complement(ranges).ranges
    if len(others) < len(ranges):
        return f"[^{_members([*others, SURROGATES])}]"
    return f"[{_members(ranges)}]"


def _members(ranges: Iterable[Range]) -> str:
    special = "]\\-^["
    return "".join(
        _escaped(low, special) + (f"-{_escaped(high, special)}" if high > low else "") for low, high in ranges
    )


def _count(least: int, most: int | None) -> str:
    if most is None:
        return {0: "*", 1: "+"}.get(least, f"{{{least},}}")
    return "?" if (least, most) == (0, 1) else f"{{{least},{most}}}"


def _escaped(code: int, special: str) -> str:
    if 0x20 <= code < 0x7F:
        return f"\\{chr(code)}" if chr(code) in special else chr(code)
    # Not \x, which takes all the hexadecimal digits that follow.
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
