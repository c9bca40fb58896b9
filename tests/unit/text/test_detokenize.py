"""What is pushed and flushed adds up to the decoding of all ids, for every kind of vocabulary and every option."""

from __future__ import annotations

import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from lightllmd.text import ByteTokenizer, Tokenizer
from lightllmd.text.fast import FastTokenizer
from lightllmd.text.vocabulary import byte_level_bytes
from text_samples import SAMPLES

CORPUS = [
    *SAMPLES,
    "the quick brown fox jumps over the lazy dog",
    "你好 世界 🙂🚀 naïve café",
    "lower lowest newer",
] * 3


def byte_level() -> FastTokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("｜mark▁｜", normalized=False)])
    return FastTokenizer(backend, eos_ids=[backend.token_to_id("<|end|>")])


def pieces(decoder: decoders.Decoder) -> FastTokenizer:
    """Pieces with visible spaces and byte fallback, under the given decoder."""
    words = ["▁", "▁the", "the", "▁a", "▁▁", "é", "▁naïve", "!", "你", "x"]
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken("<unk>", normalized=False), AddedToken("</s>", normalized=False)])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return FastTokenizer(backend, eos_ids=[1])


def word_piece() -> FastTokenizer:
    names = ["[UNK]", "[SEP]", "the", "##se", "un", "##aff", "##able", ".", ",", "é", "你", "##x"]
    backend = tokenizers.Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([AddedToken("[SEP]", normalized=False)])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return FastTokenizer(backend, eos_ids=[1])


def _llama_decoder(*, strip: bool) -> decoders.Decoder:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)


KINDS = {
    "bytes": ByteTokenizer(),
    "byte-level": byte_level(),
    "sentencepiece": pieces(_llama_decoder(strip=True)),
    "sentencepiece-keep": pieces(_llama_decoder(strip=False)),
    "metaspace": pieces(decoders.Metaspace()),
    "wordpiece": word_piece(),
    "no-decoder": pieces(decoders.Fuse()),
}


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids with a weight on the interesting ones: the first and the last (added), and the ones that don't exist."""
    size = tokenizer.vocab_size
    return st.lists(
        st.one_of(st.integers(0, size + 1), st.integers(max(0, size - 13), size - 1), st.integers(0, 2)), max_size=24
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_pushes_and_flush_add_up_to_the_whole_decoding(kind, data):
    tokenizer = KINDS[kind]
    ids = data.draw(ids_of(tokenizer))
    options = {
        "skip_special_tokens": data.draw(st.booleans()),
        "spaces_between_special_tokens": data.draw(st.booleans()),
        "print_eos_token": data.draw(st.sampled_from([True, False, None])),
    }
    whole = tokenizer.decode(ids, **options)
    stream = tokenizer.detokenizer(**options)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=3)))
    borders = [0, *cuts, len(ids)]
    chunks = [ids[start:end] for start, end in zip(borders, borders[1:])]  # noqa: B905, RUF007
    assert "".join(stream.push(chunk) for chunk in chunks) + stream.flush() == whole
    stream = tokenizer.detokenizer(**options)
    assert "".join(stream.push([number]) for number in ids) + stream.flush() == whole


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "wordpiece", "no-decoder"])
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_decoding_equals_the_tokenizers_library(kind, data):
    tokenizer = KINDS[kind]
    ids = data.draw(ids_of(tokenizer))
    skip = data.draw(st.booleans())
    assert tokenizer.decode(ids, skip, False) == tokenizer._backend.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-keep"])
@pytest.mark.parametrize("text", SAMPLES)
def test_sentencepiece_decoding_equals_the_tokenizers_library_on_valid_text(kind, text):
    """On invalid UTF-8 it follows the sentencepiece library instead: see test_sentencepiece."""
    tokenizer = KINDS[kind]
    ids = tokenizer._backend.encode(text.replace(" ", "▁"), add_special_tokens=False).ids
    assert tokenizer.decode(ids, True, False) == tokenizer._backend.decode(ids)


@pytest.mark.parametrize("kind", ["bytes", "byte-level", "sentencepiece"])
def test_no_incomplete_character_is_ever_released(kind):
    tokenizer = KINDS[kind]
    text = "x naïve 你好 🙂🚀 👩‍👩‍👧‍👦 é"
    ids = tokenizer.encode(text)
    stream = tokenizer.detokenizer()
    seen = ""
    for number in ids:
        seen += stream.push([number])
        assert "\ufffd" not in seen
        assert text.startswith(seen)
    assert seen + stream.flush() == text


def test_bytes_that_never_become_a_character_are_replaced_at_the_end():
    stream = ByteTokenizer().detokenizer()
    assert [stream.push([byte]) for byte in b"a\xf0\x9f\x99"] == ["a", "", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=30))
def test_invalid_utf8_is_replaced_as_python_and_rust_do(raw):
    assert ByteTokenizer().decode(list(raw)) == raw.decode("utf-8", "replace")


def test_first_piece_after_a_prompt_keeps_its_space():
    """As decode(prompt + output)[len(decode(prompt)):] has it."""
    tokenizer = KINDS["sentencepiece"]
    vocabulary = tokenizer._backend.get_vocab()
    the, mark, end = vocabulary["▁the"], vocabulary["▁"], vocabulary["</s>"]
    assert tokenizer.detokenizer([the]).push([the]) == " the"
    assert tokenizer.detokenizer([mark]).push([the]) == " the"
    assert tokenizer.detokenizer([]).push([the]) == "the"
    assert tokenizer.detokenizer([end]).push([the]) == "the"  # a prompt without text

    @settings(max_examples=150, deadline=None)
    @given(ids_of(tokenizer), ids_of(tokenizer))
    def fuzz(prompt, output):
        prompt.append(the)  # a prompt's text ends with a whole character
        stream = tokenizer.detokenizer(prompt, spaces_between_special_tokens=False, print_eos_token=None)
        before = tokenizer.decode(prompt, True, False)
        whole = tokenizer.decode(prompt + output, True, False)
        assert stream.push(output) + stream.flush() == whole[len(before) :]

    fuzz()


@pytest.mark.parametrize("kind", ["metaspace", "wordpiece"])
def test_context_of_windowed_decoders_is_the_prompt(kind):
    tokenizer = KINDS[kind]
    prompt, output = [tokenizer.vocab_size - 4] * 9, [tokenizer.vocab_size - 5, tokenizer.vocab_size - 3]
    stream = tokenizer.detokenizer(prompt, spaces_between_special_tokens=False)
    text = "".join(stream.push([number]) for number in output) + stream.flush()
    assert text == tokenizer.decode(prompt + output)[len(tokenizer.decode(prompt)) :]


def test_special_and_eos_options():
    tokenizer = KINDS["byte-level"]
    end = tokenizer.eos_ids[0]
    tool = tokenizer._backend.token_to_id("<tool>")
    ids = [*tokenizer.encode("a b"), tool, *tokenizer.encode("c"), end]

    def text(**options: bool) -> str:
        stream = tokenizer.detokenizer(**options)
        return stream.push(ids) + stream.flush()

    assert text() == "a b <tool> c"
    assert text(spaces_between_special_tokens=False) == "a b<tool>c"
    assert text(skip_special_tokens=False) == "a b <tool> c"  # print_eos_token decides about the eos
    assert text(print_eos_token=True) == "a b <tool> c <|end|>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a b <tool> c <|end|>"
    assert tokenizer.decode([tool, tool]) == "<tool> <tool>"


def test_token_bytes_add_up_to_the_text():
    tokenizer = KINDS["byte-level"]
    for text in SAMPLES:
        assert b"".join(tokenizer.token_bytes(number) or b"" for number in tokenizer.encode(text)) == text.encode()


def test_byte_alphabet_is_that_of_the_library():
    backend = decoders.ByteLevel()
    for letter in pre_tokenizers.ByteLevel.alphabet():
        assert byte_level_bytes(letter).decode("utf-8", "replace") == backend.decode([letter])
    assert len({byte_level_bytes(letter) for letter in pre_tokenizers.ByteLevel.alphabet()}) == 256


def test_one_table_serves_all_streams_of_the_same_options():
    """A stream must not copy the vocabulary: thousands are open at once."""
    tokenizer = KINDS["byte-level"]
    options = {"spaces_between_special_tokens": False}
    assert tokenizer.detokenizer(**options)._texts is tokenizer.detokenizer(**options)._texts
    random.seed(1)
    ids = random.choices(range(tokenizer.vocab_size), k=1000)
    assert tokenizer.decode(ids) == tokenizer.decode(ids)
