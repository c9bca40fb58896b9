"""Masks equal what the rules say, token by token."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllmd.engine.scheduling.restriction import Restriction, Restrictions
from lightllmd.ipc.messages import SamplingParams

EOS = 2


def allowed(mask: bytes, size: int) -> set[int]:
    """The tokens of a mask, bit by bit as `Step.masks` says."""
    if not mask:
        return set(range(size))
    assert len(mask) == (size + 31) // 32 * 4
    words = [int.from_bytes(mask[at : at + 4], "little") for at in range(0, len(mask), 4)]
    found = {token for token in range(len(words) * 32) if words[token // 32] >> token % 32 & 1}
    assert found
    assert max(found) < size
    return found


def made(params: SamplingParams, size: int = 70, vocabulary: list[bytes | None] | None = None) -> Restriction:
    reader = None if vocabulary is None else lambda: vocabulary
    restriction = Restrictions(size, [EOS], reader).of(params)
    assert restriction is not None
    return restriction


# --- allowed ids and bad words --------------------------------------------------------------------------------------


def test_nothing_restricts_a_plain_request():
    assert Restrictions(70, [EOS], None).of(SamplingParams()) is None


@pytest.mark.parametrize("size", [1, 31, 32, 33, 70, 128])
def test_allowed_ids_are_all_that_is_allowed(size):
    ids = random.Random(size).sample(range(size), (size + 1) // 2)
    restriction = made(SamplingParams(allowed_token_ids=ids), size)
    assert allowed(restriction.mask([]), size) == set(ids)
    assert restriction.mask([ids[0]]) == restriction.mask([])
    assert restriction.settled([])


def test_a_word_of_one_token_is_masked_always_and_a_longer_one_where_it_would_end():
    everything = set(range(70))
    restriction = made(SamplingParams(bad_words=[[7], [8, 9], [9, 8, 10], [8, 8, 10]]))
    assert not restriction.settled([])
    for emitted, masked in [
        ([], {7}),
        ([8], {7, 9}),
        ([9], {7}),
        ([9, 8], {7, 9, 10}),
        ([8, 8], {7, 9, 10}),
        ([9, 8, 1], {7}),
        ([1, 9, 8, 8], {7, 9, 10}),
    ]:
        assert allowed(restriction.mask(emitted), 70) == everything - masked, emitted
        assert not restriction.settled(emitted)


def test_words_of_one_token_alone_are_no_reason_to_wait_for_tokens():
    restriction = made(SamplingParams(bad_words=[[7], [9]]))
    assert restriction.settled([])
    assert allowed(restriction.mask([]), 70) == set(range(70)) - {7, 9}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=6),
    st.none() | st.lists(st.integers(0, 5), min_size=1),
    st.lists(st.integers(0, 5), max_size=8),
)
def test_a_token_is_allowed_if_it_is_listed_and_completes_no_bad_word(words, ids, emitted):
    restriction = made(SamplingParams(bad_words=words, allowed_token_ids=ids), 6)

    def good(token):
        ends = [*emitted, token]
        return (ids is None or token in ids) and not any(ends[-len(word) :] == word for word in words)

    assert allowed(restriction.mask(emitted), 6) == ({token for token in range(6) if good(token)} or {EOS})


def test_where_the_rules_leave_nothing_the_generation_can_end():
    assert allowed(made(SamplingParams(allowed_token_ids=[5], bad_words=[[5]])).mask([]), 70) == {EOS}
    restriction = made(SamplingParams(allowed_token_ids=[5], bad_words=[[5, 5]]))
    assert [allowed(restriction.mask([5] * count), 70) for count in range(2)] == [{5}, {EOS}]
    without = Restrictions(70, [], None).of(SamplingParams(allowed_token_ids=[5], bad_words=[[5]]))
    assert without is not None
    assert without.mask([]) == b""


def test_ids_that_the_model_does_not_have_are_passed_over():
    restriction = made(SamplingParams(allowed_token_ids=[5, 700], bad_words=[[701], [5, 702]]))
    assert allowed(restriction.mask([5]), 70) == {5}


# --- healing --------------------------------------------------------------------------------------------------------

# Two have the same bytes, two none, and one is the end.
LETTERS: list[bytes | None] = [b"a", b"b", b"</s>", b"ab", b"ba", b"abb", None, b"", b"bab", b"c", b"abc", b"ab", b"aa"]


def writings(text: bytes, most: int) -> list[list[int]]:
    """Every way to cover the text by at most so many tokens, of which the last alone may go on."""
    if not text:
        return [[]]
    found: list[list[int]] = []
    for number, token in enumerate(LETTERS):
        if not token or number == EOS or not most:
            continue
        if token.startswith(text):
            found.append([number])
        elif text.startswith(token):
            found += [[number, *rest] for rest in writings(text[len(token) :], most - 1)]
    return found


def fewest(text: bytes) -> int:
    size = {number: len(token or b"") for number, token in enumerate(LETTERS)}
    return min(len(way) for way in writings(text, len(text)) if sum(size[token] for token in way) == len(text))


@settings(max_examples=150, deadline=None)
@given(st.text("abc", min_size=1, max_size=5).map(str.encode), st.randoms())
def test_healing_allows_what_covers_the_text_in_as_many_tokens_as_writing_it_takes(text, chance):
    restriction = made(SamplingParams(healing=text), 20, LETTERS)
    assert not restriction.settled([])
    ways = writings(text, fewest(text))
    emitted: list[int] = []
    while not restriction.settled(emitted):
        here = {way[len(emitted)] for way in ways if way[: len(emitted)] == emitted and len(way) > len(emitted)}
        assert allowed(restriction.mask(emitted), 20) == here
        emitted.append(chance.choice(sorted(here)))
    assert b"".join(LETTERS[token] or b"" for token in emitted).startswith(text)
    assert restriction.mask(emitted) == restriction.mask([*emitted, EOS, 13]) == b""
    assert restriction.settled([*emitted, 0])


def test_special_tokens_the_end_and_rows_that_are_no_token_are_not_allowed_before_the_text_is_covered():
    vocabulary = [b"x", None, b"xy", b"x", b""]
    restriction = made(SamplingParams(healing=b"x"), 9, vocabulary)  # 2 ends a generation; 5 … 8 are rows of no token
    assert allowed(restriction.mask([]), 9) == {0, 3}


def test_bytes_of_a_character_are_covered_one_by_one_where_there_is_no_token_for_it():
    fallback: list[bytes | None] = [bytes([byte]) for byte in range(256)] + [" ü".encode()]
    restriction = Restrictions(257, [], lambda: fallback).of(SamplingParams(healing=" é".encode()))
    assert restriction is not None
    assert [allowed(restriction.mask(list(" é".encode()[:count])), 257) for count in range(3)] == [{32}, {0xC3}, {0xA9}]
    restriction = Restrictions(257, [], lambda: fallback).of(SamplingParams(healing=b" \xc3"))
    assert restriction is not None
    assert allowed(restriction.mask([]), 257) == {32, 256}  # the prompt ended inside a character


def test_other_rules_hold_beyond_the_prompt_alone():
    """What lies wholly in it is the prompt's own text: it must be possible to write that again."""
    a, ab, abb, abc = 0, {3, 11}, 5, 10
    listed = made(SamplingParams(healing=b"ab", allowed_token_ids=[abb, 9]), 20, LETTERS)
    assert allowed(listed.mask([]), 20) == {*ab, abb}
    assert allowed(listed.mask([3]), 20) == {abb, 9}
    assert listed.settled([3])
    worded = made(SamplingParams(healing=b"ab", bad_words=[[3], [abc], [3, a]]), 20, LETTERS)
    assert allowed(worded.mask([]), 20) == {*ab, abb}
    assert allowed(worded.mask([3]), 20) == set(range(20)) - {3, abc, a}
    assert not worded.settled([3])


def test_text_that_no_token_can_write_ends_the_generation():
    assert allowed(made(SamplingParams(healing=b"az"), 20, LETTERS).mask([]), 20) == {EOS}


def test_without_a_vocabulary_nothing_is_healed():
    restrictions = Restrictions(20, [EOS], None)
    restrictions.load()
    assert restrictions.of(SamplingParams(healing=b"ab")) is None


def test_the_vocabulary_is_read_once():
    reads: list[None] = []

    def vocabulary() -> list[bytes | None]:
        reads.append(None)
        return LETTERS

    restrictions = Restrictions(20, [EOS], vocabulary)
    assert not reads
    restrictions.load()
    for _ in range(2):
        assert restrictions.of(SamplingParams(healing=b"ab")) is not None
    assert len(reads) == 1


def test_branches_do_not_disturb_each_other():
    """A restriction is shared by all branches of a request."""
    restriction = made(SamplingParams(healing=b"abb", bad_words=[[9, 9]]), 20, LETTERS)
    before = restriction.mask([])
    assert restriction.mask([3]) != before
    assert restriction.mask([]) == before
