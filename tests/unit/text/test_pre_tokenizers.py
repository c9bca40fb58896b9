"""Files that only name their pre-tokenizer are cut as the model's own tokenizer.json cuts."""

from __future__ import annotations

import pytest
import tokenizers

from lightllmd.text.byte_level import PRE_TOKENIZERS, byte_level_bpe
from text_samples import SAMPLES

TEXT = "I'Ll pay 12345€  for\n\n naïve你好"

# of TEXT, spaces shown as spaces
CUTS = {
    "gpt-2": ["I", "'", "Ll", " pay", " 12345", "€", " ", " for", "\n\n", " naïve你好"],
    "smollm": ["I", "'", "Ll", " pay", " ", "1", "2", "3", "4", "5", "€", " ", " for", "\n\n", " naïve你好"],
    "llama-bpe": ["I", "'Ll", " pay", " ", "123", "45", "€", " ", " for", "\n\n", " naïve你好"],
    "qwen2": ["I", "'Ll", " pay", " ", "1", "2", "3", "4", "5", "€", " ", " for", "\n\n", " naïve你好"],
    "tekken": ["I", "'Ll", " pay", " ", "1", "2", "3", "4", "5", "€", " ", " for", "\n\n", " naïve你好"],
    "gpt-4o": ["I'Ll", " pay", " ", "123", "45", "€", " ", " for", "\n\n", " naïve你好"],
    "deepseek-v3": ["I", "'Ll", " pay", " ", "123", "45", "€", " ", " for", "\n\n", " naïve", "你好"],
}


def alphabet_bpe(name: str) -> tokenizers.Tokenizer:
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: number for number, letter in enumerate(sorted(letters))}
    return byte_level_bpe(vocabulary, [], PRE_TOKENIZERS[name])


@pytest.mark.parametrize("name", CUTS)
def test_named_pre_tokenizer_cuts_as_published(name):
    text = TEXT.encode()
    cuts, at = [], 0
    for shown, _ in alphabet_bpe(name).pre_tokenizer.pre_tokenize_str(TEXT):
        cuts.append(text[at : at + len(shown)].decode())  # one letter a byte
        at += len(shown)
    assert cuts == CUTS[name]


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_no_pre_tokenizer_loses_a_byte(name):
    backend = alphabet_bpe(name)
    for text in SAMPLES:
        expected = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        assert backend.decode(backend.encode(text).ids) == expected


def test_qwen_composes_characters_first():
    backend = alphabet_bpe("qwen2")
    assert backend.encode("e\u0301").ids == backend.encode("é").ids


def test_merges_that_dont_fit_are_refused():
    with pytest.raises(ValueError, match="don't fit"):
        byte_level_bpe({"a": 0}, [("a", "b")], PRE_TOKENIZERS["gpt-2"])
