"""Sentencepiece models: slow is the library, auto is the converted form, a GGUF file its copy; all must agree."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lightllmd.errors import ConfigInvalid
from lightllmd.text import Tokenizer, open_tokenizer
from lightllmd.text.gguf_vocab import open_metadata
from lightllmd.text.spm import PieceModel, read_model
from piece_models import train
from text_samples import SAMPLES, TEXTS

CONTROL = ("<s>", "</s>", "<unk>")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Path, sentencepiece.SentencePieceProcessor]:
    """A directory as Llama 2 has it."""
    folder = tmp_path_factory.mktemp("llama")
    library = train(folder / "tokenizer.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder, library


def metadata_of(model: PieceModel) -> dict[str, Any]:
    """What llama.cpp's converter would write."""
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": model.pieces,
        "tokenizer.ggml.scores": model.scores,
        "tokenizer.ggml.token_type": model.kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def all_forms(llama: tuple[Path, Any]) -> dict[str, Tokenizer]:
    folder, _ = llama
    return {
        "slow": open_tokenizer(folder, mode="slow"),
        "auto": open_tokenizer(folder, mode="auto"),
        "gguf": open_metadata(metadata_of(read_model(folder / "tokenizer.model"))),
    }


def test_model_file_is_read_as_the_library_reads_it(llama):
    folder, library = llama
    model = read_model(folder / "tokenizer.model")
    size = library.get_piece_size()
    assert model.pieces == [library.id_to_piece(number) for number in range(size)]
    assert model.scores == [library.get_score(number) for number in range(size)]
    assert [kind == 6 for kind in model.kinds] == [library.is_byte(number) for number in range(size)]
    assert [kind == 3 for kind in model.kinds] == [library.is_control(number) for number in range(size)]
    assert (model.model_type, model.add_dummy_prefix, model.remove_extra_whitespaces, model.plain) == (
        2, True, False, True,
    )  # fmt: skip


def test_every_form_encodes_exactly_as_the_library(llama):
    _, library = llama
    forms = all_forms(llama)
    assert not any(tokenizer.warnings for tokenizer in forms.values())
    for text in SAMPLES:
        for name, tokenizer in forms.items():
            assert tokenizer.encode(text, add_special_tokens=False) == library.encode(text), (name, text)

    @settings(max_examples=200, deadline=None)
    @given(TEXTS)
    def fuzz(text):
        assume(not any(piece in text for piece in CONTROL))  # the library finds none in a text, transformers do
        expected = library.encode(text)
        for name, tokenizer in forms.items():
            assert tokenizer.encode(text, add_special_tokens=False) == expected, name

    fuzz()


def test_every_form_decodes_exactly_as_the_library(llama):
    _, library = llama
    forms = all_forms(llama)
    known = st.integers(1, library.get_piece_size() - 1)  # <unk> is hidden here, the library writes it as ⁇

    @settings(max_examples=300, deadline=None)
    @example([197, 1, 131], False)  # two bytes of a character, and a control token between them
    @given(st.lists(st.one_of(known, st.integers(3, 258)), max_size=20), st.booleans())
    def fuzz(ids, whole):
        # There the library ends a character, where transformers leave the control token out and go on with it.
        assume(not any(library.is_byte(one) and library.is_control(after) for one, after in pairwise(ids)))
        expected = library.decode(ids)
        for name, tokenizer in forms.items():
            stream = tokenizer.detokenizer()
            pushed = stream.push(ids) if whole else "".join(stream.push([number]) for number in ids)
            assert pushed + stream.flush() == expected == tokenizer.decode(ids), name

    fuzz()


def test_texts_survive_the_round_trip(llama):
    for tokenizer in all_forms(llama).values():
        for text in SAMPLES:
            if "▁" not in text:  # the visible space is a space to sentencepiece
                assert tokenizer.decode(tokenizer.encode(text)) == text


def test_generated_text_keeps_its_space_after_the_prompt(llama):
    for tokenizer in all_forms(llama).values():
        prompt = tokenizer.encode("the quick")
        fox = tokenizer.encode(" fox", add_special_tokens=False)[-1]
        assert tokenizer.detokenizer(prompt).push([fox]).strip() == tokenizer.decode([fox])
        assert tokenizer.decode(prompt) + tokenizer.detokenizer(prompt).push([fox]) == tokenizer.decode([*prompt, fox])


def test_special_tokens_in_a_text_are_tokens(llama):
    _, library = llama
    inside = library.encode("[INST] hi [/INST]")
    for tokenizer in all_forms(llama).values():
        assert tokenizer.encode("<s>[INST] hi [/INST]</s>", add_special_tokens=False) == [1, *inside, 2]
        assert tokenizer.encode("[INST] hi [/INST]") == [1, *inside]
        assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, [2])


def test_added_tokens_of_the_configuration(llama, tmp_path):
    folder, library = llama
    size = library.get_piece_size()
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_bos_token": False,
                "add_eos_token": True,
                "eos_token": "<|end|>",
                "added_tokens_decoder": {
                    str(size): {"content": "<|end|>", "special": True, "rstrip": True},
                    str(size + 1): {"content": "<tool>", "special": False},
                },
            }
        )
    )
    for mode in ("slow", "auto"):
        tokenizer = open_tokenizer(tmp_path, mode=mode)
        fox = library.encode("fox")
        assert tokenizer.encode("fox<|end|>  fox<tool>") == [*fox, size, *fox, size + 1, size]
        assert tokenizer.vocab_size == size + 2
        assert tokenizer.is_special(size)
        assert not tokenizer.is_special(size + 1)
        assert tokenizer.decode([*fox, size + 1, size]) == "fox <tool>"


def test_hundreds_of_added_tokens_cost_no_more_than_one(llama, tmp_path):
    """A text full of their first letters is the worst case; it must be linear, whatever their number."""
    folder, library = llama
    size = library.get_piece_size()
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    entries = {str(size + n): {"content": f"[control_{n}]", "special": True, "rstrip": True} for n in range(1000)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.encode("[control_12] [control_1]", False) == [size + 12, size + 1]
    text = "[" * 20_000 + "[control_999]  " * 20_000
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(size + 999) == 20_000
    assert tokenizer.encode("[" * 20_000, add_special_tokens=False) == ids[:-20_000]


def test_without_legacy_only_the_first_run_gets_a_space(llama, tmp_path):
    folder, library = llama
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": False}))
    prefix = library.encode("</")  # stands for: a run that begins with the library's own space
    for mode in ("slow", "auto"):
        tokenizer = open_tokenizer(tmp_path, mode=mode)
        assert tokenizer.encode("</", add_special_tokens=False) == prefix
        ids = tokenizer.encode("x</s>the", add_special_tokens=False)
        pieces = [tokenizer.id_to_token(number) for number in ids]
        assert pieces[0].startswith("▁")
        assert not pieces[pieces.index("</s>") + 1].startswith("▁")


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"remove_extra_whitespaces": True, "byte_fallback": False, "character_coverage": 1.0},
    ],
)
def test_models_that_are_no_plain_bpe_run_through_the_library(options, tmp_path):
    library = train(tmp_path / "tokenizer.model", **options)
    tokenizer = open_tokenizer(tmp_path)
    assert any("no plain BPE" in warning for warning in tokenizer.warnings)
    for text in SAMPLES:
        ids = library.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        if library.unk_id() not in ids:
            assert tokenizer.decode(ids) == library.decode(ids)


def test_user_defined_pieces_and_no_dummy_prefix(tmp_path):
    """As Gemma's: runs of spaces are pieces of their own kind."""
    options = {"user_defined_symbols": ["▁▁", "▁▁▁▁", "<tag>"], "add_dummy_prefix": False}
    library = train(tmp_path / "tokenizer.model", **options)
    model = read_model(tmp_path / "tokenizer.model")
    gguf = open_metadata(metadata_of(model) | {"tokenizer.ggml.add_space_prefix": False})
    forms = [open_tokenizer(tmp_path, mode="slow"), open_tokenizer(tmp_path), gguf]

    @settings(max_examples=150, deadline=None)
    @given(st.one_of(TEXTS, st.text(" a<tag>", max_size=20)))
    def fuzz(text):
        assume("▁" not in text)  # a visible space among spaces: the library prefers it as the begin of a symbol
        ids = library.encode(text)
        for tokenizer in forms:
            assert tokenizer.encode(text, add_special_tokens=False) == ids
            assert tokenizer.decode(ids, spaces_between_special_tokens=False) == library.decode(ids)

    fuzz()


def test_slow_without_a_model_says_so(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    Backend(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path, mode="slow")
    assert any("no sentencepiece model" in warning for warning in tokenizer.warnings)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's ranks
    assert any("no sentencepiece model" in warning for warning in open_tokenizer(tmp_path, mode="slow").warnings)
    assert not open_tokenizer(tmp_path, mode="auto").warnings


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_no_damaged_model_file_escapes_as_another_error(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "damaged.model"
    path.write_bytes(raw)
    try:
        read_model(path)
    except (ValueError, ConfigInvalid):
        pass


def test_directory_without_any_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigInvalid, match=r"tokenizer\.json"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigInvalid, match="can't be used"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigInvalid, match="JSON object"):
        open_tokenizer(tmp_path)
