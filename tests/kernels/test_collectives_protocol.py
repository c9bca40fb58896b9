"""The signals of `collectives_one_shot` and `collectives_two_shot` as a state machine, whose every order of events is
walked through: ranks, programs of a launch, launches of different kinds and widths, graphs that are replayed.

Each place in memory has one rank that stores to it and one that loads. In no state may both be about to (a race, but
for letters and flags, which are atomic), may a load find anything but what was sent for it, or may none be able to go
on. With that, and with release and acquire where the kernels have them, weaker memory shows nothing else.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import pytest

Place = tuple[object, ...]
Order = list[tuple[str, int]]  # launches: kind, programs


class Event(NamedTuple):
    """Of one program: it stores or sends (atomically) `value`, loads it, or waits until it is there."""

    does: str
    place: Place
    value: int
    launch: int


class Rules(NamedTuple):
    """What the protocol does; otherwise to see that the walk finds it."""

    turns: int = 2  # of letters
    gather_ends_together: bool = True
    counted_on_device: bool = True  # else a graph has the numbers of its capture


def program_of(rules: Rules, ranks: int, rank: int, program: int, kind: str, call: int, launch: int) -> Iterator[Event]:
    """What a program does in a launch. `call`: how many it has made."""
    others = [(rank + step) % ranks for step in range(1, ranks)]
    if kind == "one":
        turn = call % rules.turns
        yield from (Event("send", ("letter", peer, turn, rank, program), call, launch) for peer in others)
        yield from (Event("await", ("letter", rank, turn, peer, program), call, launch) for peer in others)
        return
    region = (program + launch) % 2  # launches of other sizes have their parts elsewhere
    yield from (Event("store", ("part", peer, rank, region), launch, launch) for peer in others)
    yield from (Event("send", ("flag", peer, 0, rank, program), call, launch) for peer in others)
    yield from (Event("await", ("flag", rank, 0, peer, program), call, launch) for peer in others)
    yield from (Event("load", ("part", rank, peer, region), launch, launch) for peer in others)
    if kind == "two":
        yield from (Event("store", ("result", peer, rank, region), launch, launch) for peer in others)
    if kind == "two" or rules.gather_ends_together:
        yield from (Event("send", ("flag", peer, 1, rank, program), call, launch) for peer in others)
        yield from (Event("await", ("flag", rank, 1, peer, program), call, launch) for peer in others)
    if kind == "two":
        yield from (Event("load", ("result", rank, peer, region), launch, launch) for peer in others)


def events_of(rules: Rules, ranks: int, rank: int, program: int, order: Order, replays: int) -> list[Event]:
    """All that a program does."""
    calls: Counter[str] = Counter()
    events: list[Event] = []
    for launch, (kind, programs) in enumerate(order * replays):
        if launch % len(order) == 0 and not rules.counted_on_device:
            calls.clear()
        if program < programs:
            counter = "mail" if kind == "one" else "shares"
            calls[counter] += 1
            events += program_of(rules, ranks, rank, program, kind, calls[counter], launch + 1)
    return events


def wrong(orders: list[Order], rules: Rules | None = None, replays: int = 1) -> str:
    """What is wrong first in some order of events; empty: nothing. `orders`: the launches of each rank."""
    ranks = len(orders)
    whose = [(rank, program) for rank, order in enumerate(orders) for program in range(max(wide for _, wide in order))]
    events = [events_of(rules or Rules(), ranks, *who, orders[who[0]], replays) for who in whose]
    stores: dict[Place, list[tuple[int, int, int, int]]] = defaultdict(list)  # launch, place in program, program, value
    for at, mine in enumerate(events):
        for step, event in enumerate(mine):
            if event.does in ("store", "send"):
                stores[event.place].append((event.launch, step, at, event.value))

    def found(place: Place, state: tuple[int, ...]) -> int:
        return max((store for store in stores[place] if store[1] < state[store[2]]), default=(0, 0, 0, 0))[3]

    begin = tuple(0 for _ in events)
    seen, ahead = {begin}, [begin]
    while ahead:
        state = ahead.pop()
        coming = {at: mine[step] for at, (mine, step) in enumerate(zip(events, state, strict=True)) if step < len(mine)}
        # A launch begins when those before it have ended on its rank.
        first: dict[int, int] = {}
        for at, event in coming.items():
            first[whose[at][0]] = min(event.launch, first.get(whose[at][0], event.launch))
        coming = {at: event for at, event in coming.items() if event.launch == first[whose[at][0]]}
        plain = Counter(event.place for event in coming.values() if event.does in ("store", "load"))
        if any(count > 1 for count in plain.values()):
            return f"a race for {plain.most_common(1)[0][0]}"
        able = [at for at, event in coming.items() if event.does != "await" or found(event.place, state) == event.value]
        if coming and not able:
            return f"none can go on: {sorted(map(str, coming.values()))}"
        for at in able:
            if coming[at].does == "load" and (there := found(coming[at].place, state)) != coming[at].value:
                return f"{coming[at]} finds {there}"
            following = (*state[:at], state[at] + 1, *state[at + 1 :])
            if following not in seen:
                seen.add(following)
                ahead.append(following)
    return ""


ORDERS: dict[str, tuple[Order, int]] = {  # and how often it is replayed
    "one shot": ([("one", 2), ("one", 1), ("one", 2)], 2),
    "two shots": ([("two", 2), ("two", 1)], 1),
    "gathers": ([("gather", 2), ("gather", 2)], 1),
    "two shots, then a gather": ([("two", 1), ("gather", 2)], 1),
    "a gather, then two shots": ([("gather", 2), ("two", 1)], 1),
    "a step, twice": ([("one", 1), ("two", 1), ("gather", 1)], 2),
}


@pytest.mark.parametrize("name", ORDERS)
def test_nothing_is_lost_overwritten_or_waited_for_in_vain(name: str) -> None:
    order, replays = ORDERS[name]
    assert wrong([order, order], replays=replays) == ""


@pytest.mark.parametrize(
    "order", [[("one", 1)] * 4, [("two", 1), ("gather", 1), ("one", 1)], [("gather", 1), ("two", 1)]]
)
def test_three_ranks_neither(order: Order) -> None:
    assert wrong([order] * 3) == ""


@pytest.mark.parametrize(
    ("rules", "order", "replays"),
    [
        (Rules(turns=1), [("one", 1)], 3),  # a fast rank overwrites what a slow one has not read
        (Rules(gather_ends_together=False), [("gather", 1)], 2),  # likewise
        (Rules(counted_on_device=False), [("two", 1)], 2),  # the last replay's flags are taken for this one's
    ],
)
def test_the_walk_finds_what_each_rule_is_for(rules: Rules, order: Order, replays: int) -> None:
    assert wrong([order, order], rules, replays)


def test_ranks_that_launch_in_another_order_would_wait_for_ever() -> None:
    assert wrong([[("one", 1), ("two", 1)], [("two", 1), ("one", 1)]]).startswith("none can go on")
