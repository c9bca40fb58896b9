"""The grammar of the JSON that is valid under a schema. What it generates is always valid; not all that is valid is
generated: properties come in the order of the schema, those that it does not name only where it asks for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lightllmd.grammar.ebnf.expressions import (
    EMPTY,
    NOTHING,
    Expression,
    Juxtaposed,
    Literal,
    OneOf,
    Reference,
    Repeat,
    alt,
    chars,
    ebnf,
    maybe,
    productive,
    repeat,
    seq,
    shared,
)
from lightllmd.grammar.ebnf.lengths import with_length
from lightllmd.grammar.ebnf.numbers import Interval, integer, multiples, number
from lightllmd.grammar.ebnf.overlap import disjoint, same, valid
from lightllmd.grammar.ebnf.reading import Alternative, SchemaDocument, Subschema, literals, refusal, written_types
from lightllmd.grammar.ebnf.regex import ANY, RegexInvalid, whole
from lightllmd.grammar.ebnf.shapes import (
    MAX_SIZE,
    ArrayShape,
    Contained,
    ObjectShape,
    StringShape,
    arrays,
    numbers,
    objects,
    text_shape,
)
from lightllmd.grammar.ebnf.strings import (
    CHARACTERS,
    ESCAPE,
    PLAIN,
    character_rule,
    counted,
    escape_rule,
    key_other_than,
    plain_key,
    quoted,
    short_format,
)

MAX_RULES = 20_000
MAX_COUNTED = 1000  # rules of an array that contains something
MAX_UNIQUE = 6  # values of an enum of which an array has each once at most


@dataclass(frozen=True)
class Layout:
    """White space between tokens."""

    inner: Expression  # after an opening bracket and before a closing one
    comma: Expression  # with what stands around it
    colon: Expression


# At most a space, behind a comma or colon: a model that likes white space comes to an end.
USUAL = Layout(EMPTY, seq(Literal(","), maybe(Literal(" "))), seq(Literal(":"), maybe(Literal(" "))))
COMPACT = Layout(EMPTY, Literal(","), Literal(":"))


def layout(pattern: str, field: str) -> Layout:
    """White space as a client's pattern has it, wherever JSON allows any. Raises InvalidRequest."""
    try:
        space = whole(pattern)
    except RegexInvalid as fault:
        raise refusal(field, f"{fault}; got {pattern!r:.80}") from None
    if not _blank(space):
        raise refusal(field, f"should match spaces, tabs and ends of lines only; got {pattern!r:.80}")
    return Layout(space, seq(space, Literal(","), space), seq(space, Literal(":"), space))


def _blank(expression: Expression) -> bool:
    match expression:
        case Literal(text):
            return not text.strip(" \t\n\r")
        case Repeat(part, _, _):
            return _blank(part)
        case Juxtaposed(parts) | OneOf(parts):
            return all(map(_blank, parts))
    blanks = [(9, 10), (13, 13), (32, 32)]
    return all(any(low <= a and b <= high for low, high in blanks) for a, b in chars(expression.ranges).ranges)  # type: ignore[union-attr]


def schema_grammar(schema: Any, field: str, form: Layout = USUAL) -> str:
    """EBNF of a schema that `field` of a request has. Raises InvalidRequest, which names the keyword by its path."""
    writer = _Writer(SchemaDocument(schema, field), form)
    rules = productive(writer.rules())
    if rules["root"] == NOTHING:
        raise refusal(field, "no value is valid under this schema")
    return ebnf(shared(rules))


class _Writer:
    """Rules by the schemas that a value has to be valid under, so that recursion ends in a reference."""

    def __init__(self, document: SchemaDocument, form: Layout) -> None:
        self._document, self._form = document, form
        string = seq(Literal('"'), CHARACTERS, Literal('"'))
        self._rules: dict[str, Expression] = {
            "character": character_rule(),
            "escape": escape_rule(),
            "string": string,
            "number": number(Interval()),
            "integer": integer(Interval()) or NOTHING,
        }
        self._names: dict[tuple[str, ...], str] = {}
        self._line: list[tuple[str, tuple[Subschema, ...]]] = []

    def rules(self) -> dict[str, Expression]:
        """All of them."""
        root = self._value([self._document.root])
        while self._line:
            name, nodes = self._line.pop()
            alternatives = self._document.alternatives(nodes)
            self._add(name, alt(self._alternative(one, f"{name}_{at}") for at, one in enumerate(alternatives)))
        self._add("root", root)
        return self._rules

    def _add(self, name: str, body: Expression) -> Reference:
        if len(self._rules) >= MAX_RULES:
            raise refusal(self._document.root.path, f"the schema makes more than {MAX_RULES} rules")
        self._rules[name] = body
        return Reference(name)

    def _value(self, nodes: Iterable[Subschema]) -> Expression:
        resolved = {node.path: node for node in map(self._document.resolved, nodes) if self._document.says(node)}
        key = tuple(sorted(resolved))
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = f"value_{len(self._names)}"
            self._line.append((name, tuple(resolved[path] for path in key)))
        return Reference(name)

    def _alternative(self, one: Alternative, name: str) -> Expression:
        values = literals(one)
        if values is not None:
            kept = [value for value in values if valid(self._document, value, one)]
            return alt(self._literal(value) for value in kept)
        for exclusion in one.excluded:
            if not all(disjoint(self._document, one, other) for other in exclusion.alternatives):
                raise refusal(exclusion.path, _NOT_APART[exclusion.path.rpartition(".")[2]])
        kinds = written_types(one)
        writers: dict[str, Callable[[Alternative, str], Expression]] = {
            "null": lambda one, name: Literal("null"),
            "boolean": lambda one, name: alt([Literal("true"), Literal("false")]),
            "number": self._number,
            "string": self._string,
            "array": self._array,
            "object": self._object,
        }
        return alt(write(one, name) for kind, write in writers.items() if kind in kinds)

    def _literal(self, value: Any) -> Expression:
        if isinstance(value, list):
            items = [seq(self._form.comma if at else EMPTY, self._literal(one)) for at, one in enumerate(value)]
            return self._bracketed("[", seq(*items), "]")
        if isinstance(value, dict):
            members = [
                seq(self._form.comma if at else EMPTY, self._literal(key), self._form.colon, self._literal(one))
                for at, (key, one) in enumerate(value.items())
            ]
            return self._bracketed("{", seq(*members), "}")
        return Literal(json.dumps(value, ensure_ascii=False))

    # --- one type -------------------------------------------------------------------------------------------------

    def _number(self, one: Alternative, name: str) -> Expression:
        shape = numbers(one)
        if shape.interval.empty:
            return NOTHING
        if shape.interval == Interval() and shape.divisor == 1 and shape.step is None:
            return Reference("integer" if shape.integers else "number")
        if shape.step is not None:
            written = multiples(shape.interval, shape.step)
        elif not shape.integers:
            return number(shape.interval)
        else:
            written = integer(shape.interval, shape.divisor)
        if written is None:
            step = shape.step or shape.divisor
            raise refusal(shape.divisor_path, f"multiples of {step} can't be enforced within these bounds")
        return written

    def _string(self, one: Alternative, name: str) -> Expression:
        shape = text_shape(one)
        if not shape.texts:
            least, most = _bounded(one, shape.least, shape.most, "minLength")
            if (least, most) == (0, None):
                return Reference("string")
            return seq(Literal('"'), counted(PLAIN, ESCAPE, least, most), Literal('"'))
        return quoted(self._text(one, shape))

    def _text(self, one: Alternative, shape: StringShape) -> Expression:
        """What matches a pattern or format, of a length."""
        text, path = shape.texts[0]
        if len(shape.texts) > 1:
            raise refusal(shape.texts[1][1], f"can't be enforced together with {path}")
        sized = with_length(text, shape.least, shape.most)
        if sized is None and (shorter := short_format(text)) is not None:
            sized = with_length(shorter, shape.least, shape.most)
        if sized is None:
            where = next(path for keyword in ("minLength", "maxLength") for _, path in one.of(keyword))
            raise refusal(where, f"can't be enforced together with {path}; say it in the pattern")
        return sized

    def _array(self, one: Alternative, name: str) -> Expression:
        shape = arrays(one)
        if shape.contains is not None and (shape.contains.least > 0 or shape.contains.most is not None):
            return self._bracketed("[", self._containing(shape, shape.contains, name), "]")
        if shape.unique_path is not None and (shape.most is None or shape.most > 1):
            return self._bracketed("[", self._unique(shape, name), "]")
        least, most = _bounded(one, shape.least, shape.most, "minItems")
        if not shape.open:
            most = min(most, len(shape.prefix)) if most is not None else len(shape.prefix)
        if most is not None and least > most:
            return NOTHING
        comma = self._form.comma
        behind = len(shape.prefix)
        tail: Expression = EMPTY
        if shape.open and (most is None or most > behind):
            item = self._value(shape.rest)
            fewest, largest = max(0, least - behind), None if most is None else most - behind
            if behind:
                tail = repeat(seq(comma, item), fewest, largest)
            else:
                more = repeat(seq(comma, item), max(0, fewest - 1), None if largest is None else largest - 1)
                tail = seq(item, more) if fewest else maybe(seq(item, more))
        for at in reversed(range(behind if most is None else min(behind, most))):
            entry = seq(comma if at else EMPTY, self._value(shape.prefix[at]))
            tail = seq(entry, tail) if at < least else maybe(seq(entry, tail))
        return self._bracketed("[", tail, "]")

    def _containing(self, shape: ArrayShape, contained: Contained, name: str) -> Expression:
        """So many items that are valid under the schema of `contains`: a rule for each number of items and of those
        among them that count. What counts for nothing may be valid under it, too, unless there may not be too many."""
        path = contained.schema.path
        if shape.unique_path is not None and (shape.most is None or shape.most > 1):
            raise refusal(path, "can't be enforced together with uniqueItems")
        behind, most = len(shape.prefix), shape.most
        if not shape.open:
            most = behind if most is None else min(most, behind)
        full = max(1, shape.least, behind) if most is None else most  # more items are as many to the rules
        enough = contained.least if contained.most is None else contained.most
        if (full + 1) * (enough + 1) > MAX_COUNTED:
            raise refusal(path, f"{enough} of {full} items are more than can be counted")
        other = () if contained.most is None else (Subschema({"not": contained.schema.schema}, f"{path}.not"),)
        for count in range(full + 1):
            nodes = shape.prefix[count] if count < behind else shape.rest
            for found in range(enough + 1):
                parts: list[Expression] = [EMPTY] if count >= shape.least and found >= contained.least else []
                if most is None or count < most:
                    comma = self._form.comma if count else EMPTY
                    after = f"{name}_{min(count + 1, full)}"
                    parts.append(seq(comma, self._value([*nodes, *other]), Reference(f"{after}_{found}")))
                    if found < enough:
                        counted_one = self._value([*nodes, contained.schema])
                        parts.append(seq(comma, counted_one, Reference(f"{after}_{found + 1}")))
                self._add(f"{name}_{count}_{found}", alt(parts) if parts else NOTHING)
        return Reference(f"{name}_0_0")

    def _unique(self, shape: ArrayShape, name: str) -> Expression:
        """Each value of an enum once at most: a rule for each set of those that are there."""
        values: list[Any] = []
        for one in self._document.alternatives(shape.rest) if not shape.prefix else ():
            for value in literals(one) or [None] * (MAX_UNIQUE + 1):
                if valid(self._document, value, one) and not any(same(value, other) for other in values):
                    values.append(value)
            if literals(one) is None:
                values = [None] * (MAX_UNIQUE + 1)
        if shape.prefix or len(values) > MAX_UNIQUE:
            raise refusal(str(shape.unique_path), f"can be enforced of items that are an enum of at most {MAX_UNIQUE}")
        texts = [self._literal(value) for value in values]
        for used in reversed(range(1 << len(values))):
            count = used.bit_count()
            parts: list[Expression] = [EMPTY] if count >= shape.least else []
            if shape.most is None or count < shape.most:
                parts += [
                    seq(self._form.comma if count else EMPTY, text, Reference(f"{name}_{used | 1 << at}"))
                    for at, text in enumerate(texts)
                    if not used >> at & 1
                ]
            self._add(f"{name}_{used}", alt(parts))
        return Reference(f"{name}_0")

    def _bracketed(self, before: str, inside: Expression, after: str) -> Expression:
        inner = self._form.inner
        return NOTHING if inside == NOTHING else seq(Literal(before), inner, inside, inner, Literal(after))

    # --- objects --------------------------------------------------------------------------------------------------

    def _object(self, one: Alternative, name: str) -> Expression:
        shape = objects(one)
        other = self._other_keys(one, shape)
        if other is not None:
            other = self._add(f"{name}_other", other)
        entries: list[tuple[Expression, bool]] = []  # of each declared property, and whether it has to be there
        for key, nodes in shape.declared.items():
            if shape.names and not any(
                valid(self._document, key, each) for each in self._document.alternatives(shape.names)
            ):
                if key in shape.required:
                    return NOTHING
                continue
            written = Literal(json.dumps(key, ensure_ascii=False))
            entries.append((seq(written, self._form.colon, self._value(nodes)), key in shape.required))
        least = 0 if shape.least <= len(shape.required) else shape.least
        if other is not None and least > len(entries) + 1:
            path = next(path for _, path in one.of("minProperties"))
            raise refusal(path, "can't be enforced of names that the schema doesn't list, which may be the same twice")
        return self._bracketed("{", self._members(one, entries, other, least, shape.most, name), "}")

    def _other_keys(self, one: Alternative, shape: ObjectShape) -> Expression | None:
        """A property that is not declared, None where there may be none."""
        if shape.by_pattern:
            [(text, nodes, path)] = shape.by_pattern
            if shape.names:
                raise refusal(path, "can't be enforced together with propertyNames")
            return seq(plain_key(text), self._form.colon, self._value(nodes))
        if not shape.open:
            return None
        if not shape.names:
            return seq(key_other_than(shape.declared), self._form.colon, self._value(shape.others))
        named = self._document.alternatives(shape.names)
        listed = [literals(each) for each in named]
        if all(values is not None for values in listed):
            for value in (value for values in listed for value in values or ()):
                if isinstance(value, str):
                    shape.declared.setdefault(value, [*shape.others])
            return None
        text = alt(self._key_text(each) for each in named if "string" in written_types(each))
        for key in shape.declared:
            if any(valid(self._document, key, each) for each in named):
                raise refusal(shape.names[0].path, f"the name of the property {key!r} is valid, too")
        return seq(plain_key(text), self._form.colon, self._value(shape.others))

    def _key_text(self, one: Alternative) -> Expression:
        values = literals(one)
        if values is not None:
            return alt(Literal(value) for value in values if isinstance(value, str))
        shape = text_shape(one)
        least, most = _bounded(one, shape.least, shape.most, "minLength")
        return self._text(one, shape) if shape.texts else repeat(ANY, least, most)

    def _members(
        self,
        one: Alternative,
        entries: Sequence[tuple[Expression, bool]],
        other: Expression | None,
        least: int,
        most: int | None,
        name: str,
    ) -> Expression:
        """From the last property to the first: what may follow once so many are there. Where no number matters, that
        is whether any is."""
        if most is not None and other is None and most >= len(entries):
            most = None
        cap = most if most is not None else max(1, least)
        if len(entries) * cap > MAX_RULES:
            path = next(path for keyword in ("maxProperties", "minProperties") for _, path in one.of(keyword))
            raise refusal(path, f"{cap} of {len(entries)} properties are more than can be counted")
        comma = self._form.comma
        behind = [self._others(other, count, least, most) for count in range(cap + 1)]
        for at in reversed(range(len(entries))):
            entry, needed = entries[at]
            if not needed:
                behind = [
                    rest if _small(rest) else self._add(f"{name}_{at}_{count}", rest)
                    for count, rest in enumerate(behind)
                ]
            before: list[Expression] = []
            for count, rest in enumerate(behind):
                full = most is not None and count >= most
                present = NOTHING if full else seq(comma if count else EMPTY, entry, behind[min(count + 1, cap)])
                before.append(present if needed else alt(part for part in (present, rest) if part != NOTHING))
            behind = before
        return behind[0]

    def _others(self, other: Expression | None, count: int, least: int, most: int | None) -> Expression:
        """Properties that are not declared, behind `count` others. Their names may be the same, so that one alone
        counts for certain."""
        missing = max(0, least - count)
        if other is None or (most is not None and count >= most):
            return EMPTY if not missing else NOTHING
        if missing > 1:
            return NOTHING
        room = None if most is None else most - count
        comma = self._form.comma
        if count:
            return repeat(seq(comma, other), missing, room)
        some = seq(other, repeat(seq(comma, other), 0, None if room is None else room - 1))
        return some if missing else maybe(some)


_NOT_APART = {
    "oneOf": "two of its schemas may be valid at once for what can be generated; use anyOf, or give each a required "
    "property with a const of its own",
    "not": "what can be generated may be valid under it",
    "if": "what can be generated without `then` may be valid under it",
}


def _small(expression: Expression) -> bool:
    return expression in (EMPTY, NOTHING) or isinstance(expression, Reference)


def _bounded(one: Alternative, least: int, most: int | None, keyword: str) -> tuple[int, int | None]:
    if least > MAX_SIZE:
        raise refusal(
            next(path for _, path in one.of(keyword)), f"more than {MAX_SIZE} are never generated; got {least}"
        )
    return least, None if most is None else min(most, MAX_SIZE)
