"""Numbers within bounds, as texts: all are within them, integers are all there."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from fractions import Fraction

from lightllmd.grammar.ebnf.expressions import NOTHING, Chars, Expression, Juxtaposed, Literal, OneOf, Repeat, matches
from lightllmd.grammar.ebnf.numbers import Interval, integer, multiples, number

EDGES = (0.1 + 0.2, 1e-7, 1e20, 1 / 3, -1e-9, 2.0**53, 123456.789, 0.0)


def some_text(expression: Expression, draw: random.Random) -> str:
    """One that matches."""
    match expression:
        case Literal(text):
            return text
        case Chars(ranges):
            return chr(draw.randint(*draw.choice(ranges)))
        case Juxtaposed(parts):
            return "".join(some_text(part, draw) for part in parts)
        case OneOf(parts):
            return some_text(draw.choice(parts), draw)
    assert isinstance(expression, Repeat)
    most = expression.least + 3 if expression.most is None else expression.most
    return "".join(some_text(expression.part, draw) for _ in range(draw.choice((expression.least, most))))


def within(value: float, interval: Interval) -> bool:
    low, high = interval.low, interval.high
    above = low is None or value > float(low) or (value == float(low) and not interval.low_excluded)
    return above and (high is None or value < float(high) or (value == float(high) and not interval.high_excluded))


def drawn(draw: random.Random, bounds: list[Decimal]) -> Interval:
    low, high = sorted(bounds)
    return Interval(draw.choice((None, low)), draw.choice((None, high)), draw.random() < 0.4, draw.random() < 0.4)


def test_integers_are_those_within_their_bounds_that_a_divisor_divides() -> None:
    draw = random.Random(1)
    for _ in range(80):
        size = 10 ** draw.randrange(5)
        interval = drawn(draw, [Decimal(draw.randint(-size, size)) for _ in range(2)])
        divisor = draw.choice((1, 1, 2, 3, 7, 10, 25, 12))
        expression = integer(interval, divisor)
        if expression is None or expression == NOTHING:
            assert divisor > 1 or not any(within(value, interval) for value in range(-size, size + 1))
            continue
        for _ in range(5):
            text = some_text(expression, draw)
            value = json.loads(text)
            assert str(value) == text
            assert within(value, interval), (interval, text)
            assert value % divisor == 0
        for value in (*range(-30, 30), *(draw.randint(-2 * size, 2 * size) for _ in range(10))):
            if divisor == 1:
                assert matches(expression, str(value)) == within(value, interval), (interval, value)


def test_numbers_are_within_their_bounds_as_doubles() -> None:
    draw = random.Random(2)
    for _ in range(150):
        bounds = [
            draw.choice((draw.choice(EDGES), round(draw.uniform(-5, 5), draw.randrange(5)), draw.uniform(-1, 1) * 1e8))
            for _ in range(2)
        ]
        interval = drawn(draw, [Decimal(repr(bound)) for bound in bounds])
        expression = number(interval)
        if expression == NOTHING:
            assert interval.empty
            continue
        for _ in range(6):
            text = some_text(expression, draw)
            assert within(json.loads(text), interval), (interval, text)
        middle = round(sum(bounds) / 2, 3)
        if -1e6 < middle < 1e6:
            text = f"{Decimal(repr(middle)):f}"
            assert matches(expression, text) == within(middle, interval) or middle == 0, (interval, text)


def test_multiples_of_a_fraction_are_those_within_their_bounds() -> None:
    draw = random.Random(3)
    said = 0
    for _ in range(150):
        step = Decimal(draw.choice(("0.01", "0.1", "0.5", "0.25", "0.05", "0.001", "1.5", "0.3", "1e-7")))
        interval = drawn(draw, [round(Decimal(draw.uniform(-9, 99)), draw.randrange(5)) for _ in range(2)])
        expression = multiples(interval, step)
        if expression is None:
            continue
        said += 1
        least = interval.low if interval.low is not None else Decimal(-3)
        for count in range(int(least / step) - 2, int(least / step) + 9):
            text = f"{(count * step).normalize():f}"
            inside = not interval.both(Interval(Decimal(text), Decimal(text))).empty
            assert matches(expression, text) == inside, (interval, step, text)
            assert not matches(expression, f"{count * step + step / 10:f}")
        for _ in range(0 if expression == NOTHING else 6):
            text = some_text(expression, draw)
            assert Fraction(text) % Fraction(step) == 0, (interval, step, text)
            assert not interval.both(Interval(Decimal(text), Decimal(text))).empty, (interval, step, text)
            json.loads(text)
    assert said > 75
