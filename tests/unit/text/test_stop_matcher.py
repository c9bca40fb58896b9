"""A stop is found on the text however it was cut into tokens, and nothing of it leaks before it is decided."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllmd.errors import InvalidRequest
from lightllmd.text import StopList, StopMatcher

LETTERS = st.text("abc", max_size=5)
TOKENS = st.lists(LETTERS, max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)


def first_stop(text: str, stops: list[str]) -> tuple[int, int] | None:
    """By brute force: the stop that ends first, the longest of those that end there."""
    found = [
        (end, -len(stop)) for stop in stops for end in range(len(text) + 1) if text[:end].endswith(stop) and end >= 1
    ]
    if not found:
        return None
    end, length = min(found)
    return end + length, end


def run(tokens: list[str], matcher: StopMatcher) -> tuple[str, list[str]]:
    pieces = [matcher.push(token, [0]) for token in tokens]
    return "".join(pieces) + matcher.flush(), pieces


@settings(max_examples=400, deadline=None)
@given(TOKENS, STOPS, st.booleans())
def test_stop_is_the_one_that_brute_force_finds_on_the_whole_text(tokens, stops, include):
    text = "".join(tokens)
    matcher = StopMatcher(StopList(stops), include)
    out, _ = run(tokens, matcher)
    expected = first_stop(text, stops)
    assert matcher.stopped == (expected is not None)
    if expected is None:
        assert out == text
        assert matcher.tokens == len(tokens)
        assert matcher.found is None
    else:
        begin, end = expected
        assert out == text[: end if include else begin]
        assert matcher.found == text[begin:end]
        consumed = next(count for count in range(len(tokens) + 1) if len("".join(tokens[:count])) >= end)
        assert matcher.tokens == consumed


@settings(max_examples=300, deadline=None)
@given(TOKENS, STOPS, st.booleans(), st.integers(1, 6))
def test_a_stop_that_is_complete_before_min_tokens_is_passed_over(tokens, stops, include, least):
    """The first that ends within or behind the token of that number counts, wherever it began."""
    text = "".join(tokens)
    before = len("".join(tokens[: least - 1]))
    found = [
        (end, -len(stop)) for stop in stops for end in range(before + 1, len(text) + 1) if text[:end].endswith(stop)
    ]
    matcher = StopMatcher(StopList(stops), include, least)
    out, _ = run(tokens, matcher)
    assert matcher.stopped == bool(found)
    end, length = min(found, default=(len(text), 0))
    assert out == text[: end if include else end + length]


def test_stop_ids_and_stops_of_hidden_tokens_wait_for_min_tokens_too():
    ids = StopMatcher(StopList([], [[7], [8, 9]]), True, 3)
    assert [ids.push("x", [number]) for number in (7, 8, 9)] == ["x"] * 3
    assert (ids.stopped, ids.tokens, ids.found) == (True, 3, [8, 9])
    hidden = StopMatcher(StopList(["<end>"]), False, 2)
    assert (hidden.push("", [5], "<end>"), hidden.stopped) == ("", False)
    assert (hidden.push("a", [6]), hidden.stopped) == ("a", False)
    assert (hidden.push("", [5], "<end>"), hidden.stopped, hidden.found) == ("", True, "<end>")


@settings(max_examples=200, deadline=None)
@given(TOKENS, STOPS)
def test_result_does_not_depend_on_how_the_text_was_cut(tokens, stops):
    text = "".join(tokens)
    whole = run([text], StopMatcher(StopList(stops), False))[0]
    assert run(tokens, StopMatcher(StopList(stops), False))[0] == whole
    assert run(list(text), StopMatcher(StopList(stops), False))[0] == whole


@settings(max_examples=200, deadline=None)
@given(TOKENS, STOPS)
def test_an_excluded_stop_is_never_partly_released(tokens, stops):
    """What was released so far is a prefix of the final text, and held text is only what may become a stop."""
    matcher = StopMatcher(StopList(stops), False)
    final = run(tokens, StopMatcher(StopList(stops), False))[0]
    released = ""
    for count, token in enumerate(tokens, 1):
        released += matcher.push(token, [0])
        assert final.startswith(released)
        if not matcher.stopped:
            held = "".join(tokens[:count])[len(released) :]
            assert held == "" or any(stop.startswith(held) for stop in stops)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), LETTERS), max_size=12),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=3),
    st.booleans(),
)
def test_stop_id_sequences_end_at_their_last_token(tokens, sequences, include):
    matcher = StopMatcher(StopList([], sequences), include)
    out = "".join(matcher.push(text, [number]) for number, text in tokens) + matcher.flush()
    ids = [number for number, _ in tokens]
    found = [
        (end, -len(stop)) for stop in sequences for end in range(1, len(ids) + 1) if ids[:end][-len(stop) :] == stop
    ]
    assert matcher.stopped == bool(found)
    if found:
        end, length = min(found)
        assert matcher.tokens == end
        assert out == "".join(text for _, text in tokens[: end if include else end + length])
    else:
        assert out == "".join(text for _, text in tokens)


def test_shown_stops_hold_nothing_back():
    matcher = StopMatcher(StopList(["\n\nHuman:"]), True)
    assert [matcher.push(text, [0]) for text in ("a\n", "\n", "Hum", "an: x", "y")] == ["a\n", "\n", "Hum", "an:", ""]
    assert matcher.stopped
    assert matcher.tokens == 4


def test_text_stop_within_a_token_wins_over_an_id_stop_of_that_token():
    matcher = StopMatcher(StopList(["b"], [[7]]), False)
    assert matcher.push("abc", [7]) == "a"
    assert matcher.stopped


def test_last_words_of_the_detokenizer_are_searched_too():
    matcher = StopMatcher(StopList(["x\ufffd"], [[1, 2]]), False)
    assert matcher.push("ax", [1]) == ""
    assert matcher.push("\ufffd") == "a"
    assert matcher.stopped
    assert matcher.tokens == 1


@pytest.mark.parametrize(
    ("strings", "sequences"),
    [([""], []), ([], [[]]), (["x" * 1025], []), (["x"] * 65, []), (["x"] * 40, [[1]] * 40), (["x" * 1024] * 8, [[1]])],
)
def test_senseless_stops_are_refused(strings, sequences):
    with pytest.raises(InvalidRequest):
        StopList(strings, sequences)


def test_long_periodic_stops_cost_no_more_than_the_text():
    """A stop like aaaa…b is the worst case of naive matching."""
    matcher = StopMatcher(StopList(["a" * 1000 + "b"] * 8), False)
    out = "".join(matcher.push("a" * 4, [0]) for _ in range(5000))
    assert len(out) == 20000 - 1000
    assert not matcher.stopped


SPECIAL = "XY"  # the text of a token that is not shown
PIECES = st.lists(st.sampled_from(["a", "b", "ab", SPECIAL]), max_size=12)
MIXED = st.lists(st.lists(st.sampled_from(["a", "b", SPECIAL]), min_size=1, max_size=4).map("".join), min_size=1)


def first_stop_beside_unshown(pieces: list[str], stops: list[str]) -> tuple[int, int] | None:
    """By brute force, as (first, one past the last) shown character: of each prefix both texts are looked at."""
    shown = full = ""
    for symbol in (symbol for piece in pieces for symbol in ([piece] if piece == SPECIAL else piece)):
        shown, full = shown + symbol.replace(SPECIAL, ""), full + symbol
        begins = [len(shown) - len(stop) for stop in stops if symbol != SPECIAL and shown.endswith(stop)]
        begins += [len(shown) - len(stop.replace(SPECIAL, "")) for stop in stops if full.endswith(stop)]
        if begins:
            return min(begins), len(shown)
    return None


@settings(max_examples=400, deadline=None)
@given(PIECES, MIXED, st.booleans())
def test_a_token_that_is_not_shown_is_found_by_its_text(pieces, stops, include):
    """And what is shown is found too, whatever unshown tokens are in it; nothing of a stop is released before."""
    matcher = StopMatcher(StopList(stops), include)
    expected = first_stop_beside_unshown(pieces, stops)
    shown = "".join(pieces).replace(SPECIAL, "")
    final = shown if expected is None else shown[: expected[1] if include else expected[0]]
    released = ""
    for piece in pieces:
        released += matcher.push("", [0], piece) if piece == SPECIAL else matcher.push(piece, [1])
        assert final.startswith(released)
    assert released + matcher.flush() == final
    assert matcher.stopped == (expected is not None)


def test_all_sequences_of_a_request_share_the_automata_of_its_stops():
    stops = StopList(["abc"] * 4, [[1, 2]])
    assert StopMatcher(stops)._chars is StopMatcher(stops)._chars is not None
    assert StopMatcher(stops)._ids is StopMatcher(stops)._ids is not None
