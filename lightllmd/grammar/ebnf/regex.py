"""Regular expressions as expressions of a grammar: what JSON Schema recommends of ECMA 262 and Python's `re` reads
alike. Where the two differ about a class of characters (``\\d``, ``\\w``, ``\\s`` and ``.``), only those that both mean
are generated. What a grammar can't say is refused: look-around, back references, word boundaries, flags."""

from __future__ import annotations

from dataclasses import dataclass

from lightllmd.grammar.ebnf.expressions import (
    EMPTY,
    Chars,
    Expression,
    Juxtaposed,
    Literal,
    OneOf,
    Repeat,
    alt,
    both,
    char_set,
    chars,
    complement,
    repeat,
    seq,
)

MAX_LENGTH = 4096  # characters of an expression
MAX_REPEATED = 1 << 16  # of a quantifier
MAX_SIZE = 20_000  # characters with all repetitions written out
_MAX_DEPTH = 50  # of groups

_DIGITS = chars([(48, 57)])
_WORD = chars([(48, 57), (65, 90), (95, 95), (97, 122)])
_SPACE = char_set("\t\n\v\f\r ")
# What either dialect's \\s takes, so that \\S generates neither.
_WIDE_SPACE = chars(
    [
        *((9, 13), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029)),
        *((0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
    ]
)
# Scripts without decimal digits of their own: for Python \\d takes the others' digits, too.
_NO_DIGITS = both(chars([(0, 0x65F), (0x3000, 0xA61F), (0xAC00, 0xD7A3)]), complement(_DIGITS.ranges))
_NO_WORD = both(chars([(0, 127)]), complement(_WORD.ranges))
_CLASSES = {
    "d": _DIGITS,
    "D": _NO_DIGITS,
    "w": _WORD,
    "W": _NO_WORD,
    "s": _SPACE,
    "S": complement(_WIDE_SPACE.ranges),
}
_DOT = complement(char_set("\n\r\u2028\u2029").ranges)
_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "v": "\v", "f": "\f", "0": "\0"}
ANY = complement(())
ANYTHING = Repeat(ANY, 0, None)


# What libraries of clients write, and the same without look-ahead.
_KNOWN = {
    # zod 4, of an e-mail address
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$": (
        r"^([A-Za-z0-9_'+-]+\.)*[A-Za-z0-9_'+-]*[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9-]*\.)+[A-Za-z]{2,}$"
    ),
}


class RegexInvalid(ValueError):
    """An expression that is none, or that a grammar can't say."""


@dataclass(frozen=True)
class _Anchor:
    end: bool


@dataclass(frozen=True)
class _Group:
    alternatives: tuple[tuple[_Item, ...], ...]


@dataclass(frozen=True)
class _Repeated:
    item: _Item
    least: int
    most: int | None


_Item = Literal | Chars | _Anchor | _Group | _Repeated


def whole(pattern: str) -> Expression:
    """The texts that `pattern` matches from beginning to end. Raises RegexInvalid."""
    return _bounded(_outer(_Parser(pattern).parse(), EMPTY, EMPTY))


def searched(pattern: str) -> Expression:
    """The texts in which `pattern` is found somewhere, as JSON Schema means it. Raises RegexInvalid."""
    return _bounded(_outer(_Parser(pattern).parse(), ANYTHING, ANYTHING))


def _outer(group: _Group, before: Expression, after: Expression) -> Expression:
    """With what may stand around each alternative that has no anchor there."""
    found = []
    for items in group.alternatives:
        left, right, kept = before, after, list(items)
        while kept and kept[0] == _Anchor(False):
            del kept[0]
            left = EMPTY
        while kept and kept[-1] == _Anchor(True):
            kept.pop()
            right = EMPTY
        if len(kept) == 1 and isinstance(kept[0], _Group):
            found.append(_outer(kept[0], left, right))
        else:
            found.append(seq(left, *map(_inner, kept), right))
    return alt(found)


def _inner(item: _Item) -> Expression:
    match item:
        case _Anchor(end):
            raise RegexInvalid(f"{'$' if end else '^'} within an expression can't be enforced")
        case _Group(alternatives):
            return alt(seq(*map(_inner, items)) for items in alternatives)
        case _Repeated(inner, least, most):
            return repeat(_inner(inner), least, most)
    return item


def _bounded(expression: Expression) -> Expression:
    if _size(expression) > MAX_SIZE:
        raise RegexInvalid(f"with its repetitions it has more than {MAX_SIZE} characters")
    return expression


def _size(expression: Expression) -> int:
    match expression:
        case Literal(text):
            return len(text)
        case Juxtaposed(parts) | OneOf(parts):
            return sum(map(_size, parts))
        case Repeat(Chars(), _, _):
            return 1  # is counted, not written out
        case Repeat(part, least, most):
            return _size(part) * max(1, least, most or 0)
    return 1


class _Parser:
    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_LENGTH:
            raise RegexInvalid(f"it has {len(pattern)} characters, more than {MAX_LENGTH}")
        self._text = _KNOWN.get(pattern, pattern)
        self._at = 0

    def parse(self) -> _Group:
        group = self._group(0)
        if self._at < len(self._text):
            raise self._fault("unbalanced )")
        return group

    # --- reading --------------------------------------------------------------------------------------------------

    def _peek(self, size: int = 1) -> str:
        return self._text[self._at : self._at + size]

    def _take(self, size: int = 1) -> str:
        taken = self._peek(size)
        self._at += size
        return taken

    def _found(self, text: str) -> bool:
        if not self._text.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _fault(self, words: str) -> RegexInvalid:
        return RegexInvalid(f"{words}, at character {min(self._at, len(self._text))}")

    # --- structure ------------------------------------------------------------------------------------------------

    def _group(self, depth: int) -> _Group:
        if depth > _MAX_DEPTH:
            raise self._fault(f"groups are nested deeper than {_MAX_DEPTH}")
        alternatives: list[tuple[_Item, ...]] = []
        items: list[_Item] = []
        while self._at < len(self._text) and self._peek() != ")":
            if self._found("|"):
                alternatives.append(tuple(items))
                items = []
            else:
                items.append(self._quantified(self._atom(depth)))
        return _Group((*alternatives, tuple(items)))

    def _atom(self, depth: int) -> _Item:
        char = self._take()
        match char:
            case "^" | "$":
                return _Anchor(char == "$")
            case ".":
                return _DOT
            case "[":
                return self._set()
            case "(":
                return self._parenthesis(depth)
            case "*" | "+" | "?":
                raise self._fault(f"nothing to repeat before {char}")
            case "\\":
                return self._escape()
        if 0xD800 <= ord(char) <= 0xDFFF:
            raise self._fault("a lone surrogate is no character")
        return Literal(char)

    def _parenthesis(self, depth: int) -> _Item:
        if self._peek() == "?":
            begin = self._at
            if not self._found("?:"):
                if not (self._found("?P<") or self._found("?<")) or self._peek() in ("=", "!"):
                    self._at = begin
                    kind = {"=": "look-ahead", "!": "look-ahead", "<": "look-behind"}.get(self._peek(2)[1:], "a flag")
                    raise self._fault(f"{kind} (({self._peek(3)}…) can't be enforced")
                name, closed, _ = self._text[self._at :].partition(">")
                if not closed or not name.isidentifier():
                    raise self._fault("a group's name should end with >")
                self._at += len(name) + 1
        group = self._group(depth + 1)
        if not self._found(")"):
            raise self._fault("a ) is missing")
        return group

    def _quantified(self, item: _Item) -> _Item:
        begin = self._at
        bounds = self._quantifier()
        if bounds is None:
            return item
        least, most = bounds
        if isinstance(item, _Anchor):
            raise self._fault("an anchor can't be repeated")
        if (most is not None and most < least) or max(least, most or 0) > MAX_REPEATED:
            quantifier = self._text[begin : self._at]
            raise self._fault(f"{quantifier} should ascend and have at most {MAX_REPEATED}")
        if self._found("+"):
            raise self._fault("a possessive quantifier can't be enforced")
        self._found("?")  # lazy: the same texts match
        if self._quantifier() is not None:
            raise self._fault("a quantifier follows another one")
        return _Repeated(item, least, most)

    def _quantifier(self) -> tuple[int, int | None] | None:
        simple = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(self._peek())
        if simple is not None:
            self._at += 1
            return simple
        if self._peek() != "{":
            return None
        inside, closed, _ = self._text[self._at + 1 : self._at + 16].partition("}")
        least, comma, most = inside.partition(",")
        if closed and comma and not least and most.isdecimal():
            raise self._fault(f"{{{inside}}} means different things; write {{0,{most}}}")
        numbers = [part for part in (least, most) if part]
        if not closed or not least or not all(part.isascii() and part.isdecimal() for part in numbers):
            return None  # an ordinary {
        self._at += len(inside) + 2
        return int(least), (int(most) if most else None if comma else int(least))

    # --- characters -----------------------------------------------------------------------------------------------

    def _escape(self) -> _Item:
        char = self._peek()
        if char in _CLASSES:
            self._at += 1
            return _CLASSES[char]
        if char in ("A", "Z", "z"):
            self._at += 1
            return _Anchor(char != "A")
        if char in ("b", "B"):
            raise self._fault(f"a word boundary (\\{char}) can't be enforced")
        if char in "123456789k" and char:
            raise self._fault(f"a back reference (\\{char}) can't be enforced")
        return Literal(self._escaped_char())

    def _escaped_char(self) -> str:
        char = self._take()
        if not char:
            raise self._fault("a \\ at the end")
        if char == "0" and self._peek().isdecimal():
            raise self._fault("an octal escape means different things")
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char == "c" and self._peek().isascii() and self._peek().isalpha():
            return chr(ord(self._take()) % 32)
        if char == "x":
            return chr(self._hexadecimal(2))
        if char == "u":
            return self._unicode()
        if char in ("p", "P"):
            raise self._fault(f"a Unicode property (\\{char}) can't be enforced")
        if char.isalnum():
            raise self._fault(f"\\{char} is no known escape")
        return char

    def _unicode(self) -> str:
        if self._found("{"):
            digits, closed, _ = self._text[self._at : self._at + 9].partition("}")
            code = self._hexadecimal(len(digits)) if closed else -1
            self._at += 1
        else:
            code = self._hexadecimal(4)
            if 0xD800 <= code < 0xDC00 and self._found("\\u"):
                low = self._hexadecimal(4)
                code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00) if 0xDC00 <= low < 0xE000 else -1
        if not 0 <= code <= 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            raise self._fault("\\u should be followed by the number of a character")
        return chr(code)

    def _hexadecimal(self, size: int) -> int:
        digits = self._take(size)
        if len(digits) != size or not digits or any(one not in "0123456789abcdefABCDEF" for one in digits):
            raise self._fault(f"{size} hexadecimal digits are expected")
        return int(digits, 16)

    def _set(self) -> Chars:
        """After the [."""
        negated = self._found("^")
        if self._peek() == "]":
            raise self._fault("a set of characters is empty")
        members: list[tuple[Chars, Chars]] = []  # each with all characters that it doesn't take
        while not self._found("]"):
            if self._at >= len(self._text):
                raise self._fault("a ] is missing")
            low = self._member()
            if isinstance(low, tuple):
                members.append(low)
                continue
            high = low
            if self._peek() == "-" and self._peek(2) not in ("-]", "-"):
                self._at += 1
                last = self._member()
                if isinstance(last, tuple) or last < low:
                    raise self._fault("a range of characters should ascend")
                high = last
            one = chars([(ord(low), ord(high))])
            members.append((one, complement(one.ranges)))
        if not negated:
            return chars(pair for taken, _ in members for pair in taken.ranges)
        others = complement(())
        for _, rest in members:
            others = both(others, rest)
        return others

    def _member(self) -> str | tuple[Chars, Chars]:
        """A character, or a class with its contrary."""
        char = self._take()
        if char != "\\":
            if char and 0xD800 <= ord(char) <= 0xDFFF:
                raise self._fault("a lone surrogate is no character")
            return char
        if self._peek() in _CLASSES:
            name = self._take()
            return _CLASSES[name], _CLASSES[name.swapcase()]
        if self._found("b"):
            return "\b"
        return self._escaped_char()
