"""Texts of numbers within bounds, in JSON's form without an exponent.

What has no bound gets one: 18 digits, so that a model that repeats a digit comes to an end and every reader takes the
number. Fractions have at most as many digits as keep different texts different doubles.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from functools import lru_cache

from lightllmd.grammar.ebnf.expressions import (
    EMPTY,
    NOTHING,
    Chars,
    Expression,
    Literal,
    alt,
    chars,
    maybe,
    repeat,
    seq,
)

MOST_DIGITS = 18  # of what has no bound
EXACT_DIGITS = 15  # so many significant ones tell doubles apart
MAX_BOUND = 10**40  # larger ones mean no bound
MAX_MULTIPLES = 2000  # of a multipleOf within bounds
MAX_DIVISOR = 1000  # of a multipleOf without bounds

_DIGIT = chars([(48, 57)])
_NONZERO = chars([(49, 57)])
_UNBOUNDED = 10**MOST_DIGITS - 1


@dataclass(frozen=True)
class Interval:
    """Numbers between two bounds; None: no bound."""

    low: Decimal | None = None
    high: Decimal | None = None
    low_excluded: bool = False
    high_excluded: bool = False

    def both(self, other: Interval) -> Interval:
        """What is in both."""
        low, high = self, self
        if other.low is not None and (
            self.low is None or (other.low, other.low_excluded) > (self.low, self.low_excluded)
        ):
            low = other
        if other.high is not None and (
            self.high is None or (-other.high, other.high_excluded) > (-self.high, self.high_excluded)
        ):
            high = other
        return Interval(low.low, high.high, low.low_excluded, high.high_excluded)

    @property
    def empty(self) -> bool:
        """Whether no number is in it."""
        if self.low is None or self.high is None:
            return False
        return self.low > self.high or (self.low == self.high and (self.low_excluded or self.high_excluded))

    @property
    def integers(self) -> tuple[int | None, int | None]:
        """The least and the largest."""
        low, high = self.low, self.high
        least = None if low is None else int(low.to_integral_value(ROUND_CEILING))
        most = None if high is None else int(high.to_integral_value(ROUND_FLOOR))
        if least is not None and self.low_excluded and least == low:
            least += 1
        if most is not None and self.high_excluded and most == high:
            most -= 1
        return least, most


def integer(interval: Interval, divisor: int = 1) -> Expression | None:
    """Integers that `divisor` divides. None: that can't be said within the limits."""
    least, most = interval.integers
    if divisor == 1:
        low = -max(_UNBOUNDED, 10 * -(most or 0)) if least is None else least
        high = max(_UNBOUNDED, 10 * (least or 0)) if most is None else most
        return _integers(low, high)
    if least is not None and most is not None and (most - least) // divisor <= MAX_MULTIPLES:
        return alt(Literal(str(one)) for one in range(-(-least // divisor) * divisor, most + 1, divisor))
    if divisor > MAX_DIVISOR or (least not in (None, 0, 1)) or (most not in (None, 0, -1)):
        return None
    positive = seq(_multiples(divisor))
    parts = [positive] if most is None else []
    parts += [Literal("0")] if least != 1 and most != -1 else []
    parts += [seq(Literal("-"), positive)] if least is None else []
    return alt(parts)


@lru_cache(16)
def _multiples(divisor: int) -> Expression:
    """Of a small number, above 0: by the remainders that their digits leave, from the last one to the first."""
    power, digits = 1, 0
    while power % divisor and digits < 4:
        power, digits = power * 10, digits + 1
    if power % divisor == 0:  # the last digits alone decide
        ends = [str(one).zfill(digits) for one in range(0, power, divisor)]
        short = [str(one) for one in range(divisor, power, divisor)]
        long = seq(_NONZERO, repeat(_DIGIT, 0, MOST_DIGITS - digits - 1), alt(map(Literal, ends)))
        return alt([*map(Literal, short), long])
    return _by_remainder(divisor)


def _by_remainder(divisor: int) -> Expression:
    """Chunks of digits that are divisible by themselves, such as 12 and 003 of 12003: not all multiples, but some of
    each length."""
    width = len(str(divisor))
    first = [str(one) for one in range(divisor, 10 ** (width + 1), divisor)][:MAX_MULTIPLES]
    later = [str(one).zfill(width) for one in range(0, 10**width, divisor)]
    return seq(alt(map(Literal, first)), repeat(alt(map(Literal, later)), 0, (MOST_DIGITS - width - 1) // width))


def multiples(interval: Interval, step: Decimal) -> Expression | None:
    """Of a step that is no integer, as decimal numbers are multiples of it: 1.13 is one of 0.01, though the doubles'
    quotient is no integer. None: that can't be said within the limits."""
    places = -int(step.normalize().as_tuple().exponent)
    numerator = int(step.scaleb(places))
    low, high = interval.low, interval.high
    if low is not None and high is not None and (high - low) / step <= MAX_MULTIPLES:
        scaled = Interval(low / step, high / step, interval.low_excluded, interval.high_excluded)
        least, most = scaled.integers
        assert least is not None
        assert most is not None
        return alt(Literal(f"{_stripped(one * step):f}") for one in range(least, most + 1))
    if numerator == 1:
        return number(interval, places)
    if low not in (None, 0) or high not in (None, 0) or 10**places % numerator or 10**places // numerator > MAX_DIVISOR:
        return None
    ends = [str(one).zfill(places) for one in range(numerator, 10**places, numerator)]
    fraction = seq(Literal("."), alt(map(Literal, dict.fromkeys([one.rstrip("0") for one in ends] + ends))))
    whole = seq(_NONZERO, repeat(_DIGIT, 0, EXACT_DIGITS - places - 1), maybe(fraction))
    positive = alt([whole, seq(Literal("0"), fraction)])
    parts = [positive] if high is None else []
    parts += [Literal("0")] if not interval.both(Interval(Decimal(0), Decimal(0))).empty else []
    parts += [seq(Literal("-"), positive)] if low is None else []
    return alt(parts)


def _stripped(value: Decimal) -> Decimal:
    """Without zeros behind the point."""
    return value.quantize(Decimal(1)) if value == value.to_integral_value() else value.normalize()


def number(interval: Interval, places: int | None = None) -> Expression:
    """Numbers, integers among them. `places`: so many decimals at most."""
    low, high = interval.low, interval.high
    if low is None and high is None and places is None:
        whole = alt([Literal("0"), seq(_NONZERO, repeat(_DIGIT, 0, MOST_DIGITS - 1))])
        exponent = seq(chars([(69, 69), (101, 101)]), maybe(chars([(43, 43), (45, 45)])), repeat(_DIGIT, 1, 2))
        fraction = seq(Literal("."), repeat(_DIGIT, 1, MOST_DIGITS))
        return seq(maybe(Literal("-")), whole, maybe(fraction), maybe(exponent))
    most = max([Decimal(_UNBOUNDED), *(10 * abs(one) for one in (low, high) if one is not None)])
    inner = Interval(
        -most if low is None else low, most if high is None else high, interval.low_excluded, interval.high_excluded
    )
    inner = _rounded(inner, places)
    assert inner.low is not None
    assert inner.high is not None
    parts: list[Expression] = []
    if inner.high >= 0:
        parts.append(
            _magnitudes(
                inner if inner.low >= 0 else Interval(Decimal(0), inner.high, False, inner.high_excluded), places
            )
        )
    if inner.low < 0:
        mirrored = Interval(-inner.high, -inner.low, inner.high_excluded, inner.low_excluded)
        above = Interval(Decimal(0), mirrored.high, True, mirrored.high_excluded)
        parts.append(seq(Literal("-"), _magnitudes(above if inner.high >= 0 else mirrored, places)))
    return alt(part for part in parts if part != NOTHING)


def _rounded(interval: Interval, places: int | None) -> Interval:
    """Bounds of more decimals than `places` are moved inwards, and excluded ones of many digits: a text of as many
    could be the bound's own double."""
    low, high, strict_low, strict_high = interval.low, interval.high, interval.low_excluded, interval.high_excluded
    if places is not None:
        assert low is not None
        assert high is not None
        exact, unit = Context(prec=MAX_BOUND.bit_length() + places), Decimal(1).scaleb(-places)
        least, most = low.quantize(unit, ROUND_CEILING, exact), high.quantize(unit, ROUND_FLOOR, exact)
        strict_low, strict_high = strict_low and low == least, strict_high and high == most
        low, high = least, most
    if low is not None and strict_low:
        inside = Context(EXACT_DIGITS, ROUND_CEILING).create_decimal(low)
        low, strict_low = inside, inside == low
    if high is not None and strict_high:
        inside = Context(EXACT_DIGITS, ROUND_FLOOR).create_decimal(high)
        high, strict_high = inside, inside == high
    return Interval(low, high, strict_low, strict_high)


def _integers(low: int, high: int) -> Expression:
    parts: list[Expression] = []
    if high >= 0 and low <= high:
        parts.append(_naturals(max(low, 0), high))
    if low < 0 and low <= high:
        parts.append(seq(Literal("-"), _naturals(max(1, -high), -low)))
    return alt(part for part in parts if part != NOTHING)


def _naturals(low: int, high: int) -> Expression:
    """Without zeros before them."""
    parts = []
    for size in range(len(str(low)), len(str(high)) + 1):
        least = max(low, 10 ** (size - 1) if size > 1 else 0)
        most = min(high, 10**size - 1)
        if least <= most:
            parts.append(_digits(str(least), str(most)))
    return alt(parts)


def _digits(low: str, high: str) -> Expression:
    """As many digits as either has, between both."""
    if not low:
        return EMPTY
    rest = len(low) - 1
    if low == "0" * (rest + 1) and high == "9" * (rest + 1):
        return repeat(_DIGIT, rest + 1, rest + 1)
    if low[0] == high[0]:
        return seq(Literal(low[0]), _digits(low[1:], high[1:]))
    first, last = int(low[0]), int(high[0])
    parts = []
    if low[1:].strip("0"):
        parts.append(seq(Literal(low[0]), _digits(low[1:], "9" * rest)))
        first += 1
    if high[1:].strip("9"):
        parts.append(seq(Literal(high[0]), _digits("0" * rest, high[1:])))
        last -= 1
    if first <= last:
        parts.append(seq(_digit(first, last), repeat(_DIGIT, rest, rest)))
    return alt(parts)


def _digit(first: int, last: int) -> Chars:
    return chars([(48 + first, 48 + last)])


def _magnitudes(interval: Interval, places: int | None = None) -> Expression:
    """Of numbers that are not negative, within two bounds. `places` are at least as many as the bounds have."""
    assert interval.low is not None
    assert interval.high is not None
    if interval.empty:
        return NOTHING
    (low, low_part), (high, high_part) = _split(interval.low), _split(interval.high)
    size = max(0, EXACT_DIGITS - len(str(min(high, max(low, 1)))))
    digits = max(size if places is None else min(size, places), len(low_part), len(high_part))
    lower = (low_part, interval.low_excluded)
    upper = (high_part, interval.high_excluded)
    if low == high:
        return seq(Literal(str(low)), _fraction(lower, upper, digits))
    parts = [
        seq(Literal(str(low)), _fraction(lower, None, digits)),
        seq(Literal(str(high)), _fraction(None, upper, digits)),
    ]
    if high - low > 1:
        parts.append(seq(_naturals(low + 1, high - 1), _fraction(None, None, digits)))
    return alt(part for part in parts if part != NOTHING)


def _split(value: Decimal) -> tuple[int, str]:
    """The integer and the digits of the fraction, without zeros at its end."""
    whole, _, part = f"{value:f}".partition(".")
    return int(whole), part.rstrip("0")


_Bound = tuple[str, bool]  # digits of a fraction, and whether it is excluded itself


def _fraction(lower: _Bound | None, upper: _Bound | None, digits: int) -> Expression:
    """None: every fraction is on this side. The empty one is 0."""
    some = seq(Literal("."), _rest(lower, upper, digits, at_least_one=True)) if digits else NOTHING
    return alt(part for part in (EMPTY if _ends(lower, upper) else NOTHING, some) if part != NOTHING)


def _ends(lower: _Bound | None, upper: _Bound | None) -> bool:
    """Whether zeros from here on are within the bounds, of which the digits so far are the beginning."""
    above = lower is None or (lower[0] == "" and not lower[1])
    return above and (upper is None or upper[0] != "" or not upper[1])


def _rest(lower: _Bound | None, upper: _Bound | None, digits: int, at_least_one: bool = False) -> Expression:
    """At most so many further digits. Bounds of which the digits so far are no beginning are None."""
    end = EMPTY if _ends(lower, upper) and not at_least_one else NOTHING
    if digits == 0:
        return end
    if lower is None and upper is None:
        return repeat(_DIGIT, 1 if at_least_one else 0, digits)
    first = int(lower[0][:1] or "0") if lower is not None else 0
    last = int(upper[0][:1] or "0") if upper is not None else 9
    next_lower = None if lower is None else (lower[0][1:], lower[1])
    next_upper = None if upper is None else (upper[0][1:], upper[1])
    parts: list[Expression] = [end]
    if first == last:
        parts.append(seq(Literal(str(first)), _rest(next_lower, next_upper, digits - 1)))
    elif first < last:
        low, high = first, last
        if next_lower is not None:
            parts.append(seq(Literal(str(first)), _rest(next_lower, None, digits - 1)))
            low += 1
        if next_upper is not None:
            parts.append(seq(Literal(str(last)), _rest(None, next_upper, digits - 1)))
            high -= 1
        if low <= high:
            parts.append(seq(_digit(low, high), repeat(_DIGIT, 0, digits - 1)))
    return alt(part for part in parts if part != NOTHING)
