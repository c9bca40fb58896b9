"""The tokenizer of a directory in Hugging Face layout.

``fast`` is tokenizer.json through `tokenizers`, ``slow`` the sentencepiece library on the model's own file, ``auto``
tokenizer.json where there is one, else the sentencepiece file converted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from lightllmd.text.byte_level import PRE_TOKENIZERS, byte_level_bpe
from lightllmd.text.chat_template import ChatTemplate
from lightllmd.text.fast import FastTokenizer
from lightllmd.text.interface import Tokenizer
from lightllmd.text.spm import Added, Manner, PieceTokenizer, converted_encoder, library_encoder, read_model
from lightllmd.weights.model_files import (
    MAX_VOCABULARY,
    added_tokens,
    chat_templates,
    eos_token_ids,
    invalid,
    present,
    read_file,
    read_listed,
    read_text,
    text_of,
    tokenizer_config,
    usable,
)

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def open_directory(directory: Path, mode: str, eos_ids: Sequence[int] | None = None) -> Tokenizer:
    """Raises ConfigInvalid when the directory has no tokenizer that this program can run."""
    files = TokenizerFiles(directory)
    piece_file = _piece_file(directory)
    has_json = present(directory / "tokenizer.json")
    if mode == "slow" and piece_file is None:
        files.warnings.append(
            f"tokenizer_mode slow: {directory} has no sentencepiece model that can be read; the fast tokenizer is used"
        )
    elif piece_file is not None and (mode == "slow" or not has_json):
        with usable(piece_file):
            return _open_pieces(files, piece_file, mode, eos_ids)
    if has_json:
        with usable(directory / "tokenizer.json"):
            body = read_file(directory / "tokenizer.json", MAX_VOCABULARY)
            return _fast(files, tokenizers.Tokenizer.from_buffer(body), eos_ids)
    if present(directory / "vocab.json") and present(directory / "merges.txt"):
        return _fast(files, _read_vocab_and_merges(directory, files), eos_ids)
    raise invalid(f"{directory} has no tokenizer.json, no sentencepiece model and no vocab.json with merges.txt")


class TokenizerFiles:
    """What the JSON files beside a vocabulary say about it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.warnings: list[str] = []
        self.config = config = tokenizer_config(directory)
        self.roles = {role: text for role in _ROLES if (text := text_of(getattr(config, role))) is not None}
        self.special_texts = set(self.roles.values())
        for listed in (config.additional_special_tokens, config.extra_special_tokens):
            entries = listed.values() if isinstance(listed, dict) else listed or ()
            self.special_texts.update(text for entry in entries if (text := text_of(entry)) is not None)

    def added(self) -> dict[int, Added]:
        """Added tokens by id, as tokenizer_config.json or added_tokens.json list them."""
        return {
            number: Added(one.content, one.special or one.content in self.special_texts, one.lstrip, one.rstrip)
            for number, one in added_tokens(self.directory, self.config).items()
            if one.content
        }

    def eos_ids(self, eos_token_id: int | None) -> list[int]:
        """As generation_config.json, else config.json, else the tokenizer says."""
        for name in ("generation_config.json", "config.json"):
            if ids := eos_token_ids(self.directory / name):
                return ids
        return [] if eos_token_id is None else [eos_token_id]

    def chat_template(self) -> ChatTemplate | None:
        """The model's template; None where there is none, or (with a warning) none that can be used."""
        sources = chat_templates(self.directory, self.config)
        if not sources:
            return None
        try:
            return ChatTemplate(sources, self.roles)
        except (ValueError, RecursionError) as error:
            self.warnings.append(f"{self.directory}: {error}; chat requests will be refused")
            return None


# --- the kinds of vocabularies ------------------------------------------------------------------------------------


def _fast(files: TokenizerFiles, backend: tokenizers.Tokenizer, eos_ids: Sequence[int] | None) -> FastTokenizer:
    def number(role: str) -> int | None:
        text = files.roles.get(role)
        return None if text is None else backend.token_to_id(text)

    special = (backend.token_to_id(text) for text in files.special_texts)
    return FastTokenizer(
        backend,
        special_ids=[found for found in special if found is not None],
        add_bos=files.config.add_bos_token,
        add_eos=files.config.add_eos_token,
        bos_id=number("bos_token"),
        eos_ids=files.eos_ids(number("eos_token")) if eos_ids is None else eos_ids,
        chat_template=files.chat_template(),
        warnings=files.warnings,
    )


def _read_vocab_and_merges(directory: Path, files: TokenizerFiles) -> tokenizers.Tokenizer:
    """GPT-2's two files; Qwen's tokenizer class has a pre-tokenizer of its own."""
    vocabulary = read_listed(directory / "vocab.json", dict[str, int])
    lines = read_text(directory / "merges.txt", MAX_VOCABULARY).split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    name = "qwen2" if (files.config.tokenizer_class or "").startswith("Qwen2") else "gpt-2"
    try:
        pairs = [(left, right) for left, right in merges]
        backend = byte_level_bpe(vocabulary, pairs, PRE_TOKENIZERS[name])
    except (ValueError, OverflowError) as error:
        raise invalid(f"{directory}: vocab.json and merges.txt can't be used: {error}") from None
    for number, token in sorted(files.added().items()):
        entry = AddedToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)
        (backend.add_special_tokens if token.special else backend.add_tokens)([entry])
        if backend.token_to_id(token.content) != number:
            raise invalid(f"{directory}: added token {token.content!r} can't have id {number}")
    return backend


def _piece_file(directory: Path) -> Path | None:
    """The directory's sentencepiece model. A tokenizer.model may be something else (tiktoken's ranks)."""
    known = [directory / name for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")]
    for path in [*known, *sorted(directory.glob("*.model"))]:
        if present(path):
            try:
                read_model(path)
            except ValueError:
                continue
            return path
    return None


def _open_pieces(files: TokenizerFiles, path: Path, mode: str, eos_ids: Sequence[int] | None) -> PieceTokenizer:
    model = read_model(path)
    if mode == "slow":
        encode_run = library_encoder(path, model)
    elif model.is_plain_bpe:
        encode_run = converted_encoder(model)
    else:
        files.warnings.append(f"{path} is no plain BPE model: it runs through the sentencepiece library (slower)")
        encode_run = library_encoder(path, model)

    added = files.added()
    numbers = {piece: number for number, piece in enumerate(model.pieces)}
    numbers |= {token.content: number for number, token in added.items()}
    special = {number: Added(text) for text in files.special_texts if (number := numbers.get(text)) is not None}
    roles = files.roles
    bos, eos = numbers.get(roles.get("bos_token", "<s>")), numbers.get(roles.get("eos_token", "</s>"))
    add_bos, add_eos = files.config.add_bos_token, files.config.add_eos_token
    return PieceTokenizer(
        model,
        encode_run,
        Manner(
            add_bos=add_bos is not False,
            add_eos=add_eos is True,
            prefix_every_run=files.config.legacy is not False,
            added=special | added,
        ),
        bos_id=bos,
        eos_ids=files.eos_ids(eos) if eos_ids is None else eos_ids,
        chat_template=files.chat_template(),
        warnings=files.warnings,
    )
