"""Patterns with bounds of their length."""

from __future__ import annotations

from lightllmd.grammar.ebnf.expressions import NOTHING, Expression, Juxtaposed, Repeat, repeat, seq, widths


def with_length(text: Expression, least: int, most: int | None) -> Expression | None:
    """Texts that match `text` and have at least and at most so many characters. Where several parts of it may be long
    each gets the same share of what `most` leaves. None: that can't be said."""
    low, high = widths(text)
    if low >= least and (most is None or (high is not None and high <= most)):
        return text
    if (high is not None and high < least) or (most is not None and low > most):
        return NOTHING
    parts: list[Expression] = [*text.parts] if isinstance(text, Juxtaposed) else [text]
    loose = [at for at, part in enumerate(parts) if isinstance(part, Repeat) and widths(part.part) == (1, 1)]
    bounds = [widths(part) for at, part in enumerate(parts) if at not in loose]
    if not loose or any(longest is None for _, longest in bounds):
        return None
    if most is not None:
        room = most - sum(longest or 0 for _, longest in bounds) - sum(_least(parts[at]) for at in loose)
        if room < 0:
            return None
        for number, at in enumerate(loose):
            share = room // (len(loose) - number)
            parts[at] = _between(parts[at], _least(parts[at]), _least(parts[at]) + share)
            room -= (widths(parts[at])[1] or 0) - _least(parts[at])
    missing = least - sum(widths(part)[0] for part in parts)
    for at in loose:
        if missing > 0:
            before = _least(parts[at])
            longest = widths(parts[at])[1]
            added = missing if longest is None else min(missing, longest - before)
            parts[at] = _between(parts[at], before + added, longest)
            missing -= added
    return seq(*parts) if missing <= 0 else None


def _least(part: Expression) -> int:
    return widths(part)[0]


def _between(part: Expression, least: int, most: int | None) -> Expression:
    """A repetition of single characters, so many times."""
    if not isinstance(part, Repeat):  # once, by an earlier bound
        return part
    ends = [one for one in (most, part.most) if one is not None]
    return repeat(part.part, max(least, part.least), min(ends, default=None))
