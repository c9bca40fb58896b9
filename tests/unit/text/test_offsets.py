"""Each token of a text is said to begin where its characters do, whatever the tokenizer made of them."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from lightllmd.text.fast import FastTokenizer
from lightllmd.text.interface import Tokenizer
from lightllmd.text.offsets import begins, token_offsets
from lightllmd.text.tokenizer import ByteTokenizer
from text_samples import TEXTS

MARKS = "<|im_start|>user\nHi<|im_end|>\n"


def byte_level(normalizer=None, *, bos: bool = False, trims: bool = False) -> FastTokenizer:
    """Every byte is a token; "<|im_start|>" and "<|im_end|>" are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    backend.add_special_tokens([AddedToken("<|im_start|>", normalized=False), AddedToken("<|im_end|>")])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    post = [processors.ByteLevel(trim_offsets=trims)]
    if bos:
        post.append(processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 256)]))
    backend.post_processor = processors.Sequence(post)
    return FastTokenizer(backend, bos_id=256)


def offsets(tokenizer: Tokenizer, text: str, *, with_spans: bool = True) -> list[int]:
    ids = tokenizer.encode(text)
    stream = tokenizer.detokenizer(skip_special_tokens=False, spaces_between_special_tokens=False, print_eos_token=None)
    pieces = [stream.push([token]) for token in ids]
    special = {index for index, token in enumerate(ids) if token in tokenizer.special_ids}
    return token_offsets(text, pieces, tokenizer.spans(text) if with_spans else None, special)


@pytest.mark.parametrize("with_spans", [True, False])
@pytest.mark.parametrize("trims", [True, False])
def test_special_tokens_have_the_room_that_their_text_takes(with_spans, trims):
    got = offsets(byte_level(trims=trims), MARKS, with_spans=with_spans)
    assert got == [0, 12, 13, 14, 15, 16, 17, 18, 19, 29]


@pytest.mark.parametrize("with_spans", [True, False])
def test_what_normalisation_shortens_keeps_its_place(with_spans):
    """e + U+0301 becomes one character of two bytes."""
    got = offsets(byte_level(normalizers.NFC()), "ae\u0301 b", with_spans=with_spans)
    assert got == [0, 1, 1, 3, 4]


def test_spans_tell_what_a_search_could_not():
    assert offsets(byte_level(normalizers.NFC()), "e\u0301e\u0301e\u0301x") == [0, 0, 2, 2, 4, 4, 6]
    assert offsets(byte_level(normalizers.Lowercase()), "AaA a") == [0, 1, 2, 3, 4]
    assert offsets(byte_level(normalizers.Lowercase()), "ABab") == [0, 1, 2, 3]
    stripped = byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), trims=True)
    assert offsets(stripped, "  \u00e9 \u00e9") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("text", ["Hi", MARKS, "  Hi  ", ""])
def test_a_token_that_the_tokenizer_put_before_the_text_takes_no_room(text):
    plain, with_bos = (offsets(byte_level(bos=bos, trims=True), text) for bos in (False, True))
    assert with_bos == [0, *plain]


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_what_decodes_to_the_text_begins_where_its_bytes_do(text):
    for tokenizer in (ByteTokenizer(), BYTES):
        want = [index for index, char in enumerate(text) for _ in char.encode()]
        assert offsets(tokenizer, text) == want
        assert offsets(tokenizer, text, with_spans=False) == want


BYTES = byte_level(trims=True)


@pytest.mark.parametrize(
    ("text", "pieces", "want"),
    [
        ("the quick", ["<s>", " the", " quick"], [0, 0, 3]),
        (" the", ["<s>", " ", " the"], [0, 0, 1]),
        ("e\u0301e\u0301 the", ["<s>", " ", "\u00e9", "\u00e9", " the"], [0, 0, 0, 2, 4]),
        ("the \ufb01ve fox", ["<s>", " the", " f", "i", "ve", " fox"], [0, 0, 3, 3, 5, 7]),
        ("The Fox", ["the", " fox", "</s>"], [0, 3, 7]),
    ],
)
def test_pieces_of_a_tokenizer_without_spans_are_found_in_the_text(text, pieces, want):
    special = {index for index, piece in enumerate(pieces) if piece in ("<s>", "</s>")}
    assert token_offsets(text, pieces, None, special) == want


def test_bytes_that_make_no_character_come_before_the_token_that_shows_so():
    assert begins([0, 2, 1], [None, 1, 1]) == [0, 1, 2]
    assert begins([1, 0, 1], [1, 0, 1], at=5) == [5, 6, 6]
    assert begins([4], [5]) == [0]  # its leading space is not shown
