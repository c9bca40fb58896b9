"""A model without a tokenizer: its text is its ids in decimal, and every token of a stream has a text."""

from __future__ import annotations

import random

import pytest

from lightllmd.errors import InvalidRequest
from lightllmd.text import IdTokenizer


def test_text_and_ids_are_the_same_both_ways():
    tokenizer = IdTokenizer(5000)
    ids = random.Random(0).choices(range(5000), k=300)
    text = tokenizer.decode(ids)
    assert text.startswith(f" {ids[0]} {ids[1]} ")
    assert tokenizer.encode(text) == ids
    assert tokenizer.encode("\t17 4\n99  ") == [17, 4, 99]
    assert tokenizer.encode_batch(["1", ""]) == [[1], []]


def test_every_token_of_a_stream_has_its_text_at_once():
    tokenizer = IdTokenizer(100)
    assert (tokenizer.vocab_size, tokenizer.special_ids, tokenizer.eos_ids) == (100, frozenset(), [])
    for shown in (True, False):
        stream = tokenizer.detokenizer([3, 4], skip_special_tokens=shown, print_eos_token=shown)
        assert [stream.push((number,)) for number in (0, 2, 99)] == [" 0", " 2", " 99"]
        assert stream.push((100,)) == stream.flush() == ""
    assert (tokenizer.token_bytes(7), tokenizer.id_to_token(7), tokenizer.id_to_token(100)) == (b" 7", "7", None)


@pytest.mark.parametrize("word", ["hello", "-1", "1.5", "5000", "²", "١", "9" * 5000])
def test_other_text_is_refused_by_word_and_bound(word: str):
    with pytest.raises(InvalidRequest) as refused:
        IdTokenizer(5000).encode(f"1 2 {word} 3")
    assert word[:30] in refused.value.message
    assert "0 … 4999" in refused.value.message
    assert len(refused.value.message) < 250


def test_a_conversation_is_refused():
    with pytest.raises(InvalidRequest, match="no chat template"):
        IdTokenizer(10).encode_chat([{"role": "user", "content": "hi"}])
