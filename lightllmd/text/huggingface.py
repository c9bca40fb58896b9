"""The tokenizer of a directory in Hugging Face layout.

``fast`` is tokenizer.json through `tokenizers`, ``slow`` the sentencepiece library on the model's own file, ``auto``
tokenizer.json where there is one, else the sentencepiece file converted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from lightllmd.errors import ConfigInvalid, Problem
from lightllmd.text.byte_level import PRE_TOKENIZERS, byte_level_bpe
from lightllmd.text.chat_template import ChatTemplate
from lightllmd.text.fast import FastTokenizer
from lightllmd.text.interface import Tokenizer
from lightllmd.text.spm import Added, Manner, PieceTokenizer, converted_encoder, library_encoder, read_model

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def open_directory(directory: Path, mode: str, eos_ids: Sequence[int] | None = None) -> Tokenizer:
    """Raises ConfigInvalid when the directory has no tokenizer that this program can run."""
    files = TokenizerFiles(directory)
    piece_file = _piece_file(directory)
    has_json = (directory / "tokenizer.json").is_file()
    if mode == "slow" and piece_file is None:
        files.warnings.append(
            f"tokenizer_mode slow: {directory} has no sentencepiece model that can be read; the fast tokenizer is used"
        )
    elif piece_file is not None and (mode == "slow" or not has_json):
        return _open_pieces(files, piece_file, mode, eos_ids)
    if has_json:
        return _fast(files, _read_json_tokenizer(directory / "tokenizer.json"), eos_ids)
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        return _fast(files, _read_vocab_and_merges(directory, files), eos_ids)
    raise _invalid(f"{directory} has no tokenizer.json, no sentencepiece model and no vocab.json with merges.txt")


class TokenizerFiles:
    """What the JSON files beside a vocabulary say about it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.warnings: list[str] = []
        self.config = _read_json(directory / "tokenizer_config.json")
        merged = {**_read_json(directory / "special_tokens_map.json"), **self.config}
        self.roles = {role: text for role in _ROLES if (text := _token_text(merged.get(role))) is not None}
        self.special_texts = set(self.roles.values())
        for key in ("additional_special_tokens", "extra_special_tokens"):
            listed = merged.get(key)
            entries: Iterable[object] = listed.values() if isinstance(listed, dict) else listed or ()
            self.special_texts.update(text for entry in entries if (text := _token_text(entry)) is not None)

    def added(self) -> dict[int, Added]:
        """Added tokens by id, as tokenizer_config.json or added_tokens.json list them."""
        found: dict[int, Added] = {}
        for text, number in _read_json(self.directory / "added_tokens.json").items():
            found[int(number)] = Added(text, special=text in self.special_texts)
        for number, entry in (self.config.get("added_tokens_decoder") or {}).items():
            content = _token_text(entry)
            if content:
                special = bool(entry.get("special")) or content in self.special_texts
                found[int(number)] = Added(content, special, bool(entry.get("lstrip")), bool(entry.get("rstrip")))
        return found

    def eos_ids(self, eos_token_id: int | None) -> list[int]:
        """As generation_config.json, else config.json, else the tokenizer says."""
        for name in ("generation_config.json", "config.json"):
            value = _read_json(self.directory / name).get("eos_token_id")
            if isinstance(value, int):
                return [value]
            if isinstance(value, list) and value:
                return [int(number) for number in value]
        return [] if eos_token_id is None else [eos_token_id]

    def chat_template(self) -> ChatTemplate | None:
        sources = self._template_sources()
        if not sources:
            return None
        try:
            return ChatTemplate(sources, self.roles)
        except ValueError as error:
            self.warnings.append(f"{self.directory}: {error}; chat requests will be refused")
            return None

    def _template_sources(self) -> dict[str, str]:
        """Template texts by name; a file of its own wins over the entry in tokenizer_config.json."""
        given = self.config.get("chat_template") or _read_json(self.directory / "chat_template.json").get(
            "chat_template"
        )
        sources: dict[str, str] = {}
        if isinstance(given, str):
            sources["default"] = given
        elif isinstance(given, list):
            sources.update((str(entry["name"]), str(entry["template"])) for entry in given)
        elif isinstance(given, dict):
            sources.update((str(name), str(text)) for name, text in given.items())
        main = self.directory / "chat_template.jinja"
        if main.is_file():
            sources["default"] = main.read_text(encoding="utf-8")
        for path in sorted((self.directory / "additional_chat_templates").glob("*.jinja")):
            sources[path.stem] = path.read_text(encoding="utf-8")
        return sources


# --- the kinds of vocabularies ------------------------------------------------------------------------------------


def _fast(files: TokenizerFiles, backend: tokenizers.Tokenizer, eos_ids: Sequence[int] | None) -> FastTokenizer:
    def number(role: str) -> int | None:
        text = files.roles.get(role)
        return None if text is None else backend.token_to_id(text)

    special = (backend.token_to_id(text) for text in files.special_texts)
    return FastTokenizer(
        backend,
        special_ids=[found for found in special if found is not None],
        add_bos=_switch(files.config, "add_bos_token"),
        add_eos=_switch(files.config, "add_eos_token"),
        bos_id=number("bos_token"),
        eos_ids=files.eos_ids(number("eos_token")) if eos_ids is None else eos_ids,
        chat_template=files.chat_template(),
        warnings=files.warnings,
    )


def _read_json_tokenizer(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise _invalid(f"{path} can't be used: {error}") from None


def _read_vocab_and_merges(directory: Path, files: TokenizerFiles) -> tokenizers.Tokenizer:
    """GPT-2's two files; Qwen's tokenizer class has a pre-tokenizer of its own."""
    vocabulary = _read_json(directory / "vocab.json")
    lines = (directory / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    name = "qwen2" if str(files.config.get("tokenizer_class", "")).startswith("Qwen2") else "gpt-2"
    try:
        pairs = [(left, right) for left, right in merges]
        backend = byte_level_bpe(vocabulary, pairs, PRE_TOKENIZERS[name])
    except ValueError as error:
        raise _invalid(f"{directory}: vocab.json and merges.txt can't be used: {error}") from None
    for number, token in sorted(files.added().items()):
        entry = AddedToken(token.content, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)
        (backend.add_special_tokens if token.special else backend.add_tokens)([entry])
        if backend.token_to_id(token.content) != number:
            raise _invalid(f"{directory}: added token {token.content!r} can't have id {number}")
    return backend


def _piece_file(directory: Path) -> Path | None:
    """The directory's sentencepiece model. A tokenizer.model may be something else (tiktoken's ranks)."""
    known = [directory / name for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")]
    for path in [*known, *sorted(directory.glob("*.model"))]:
        if path.is_file():
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
    add_bos, add_eos = _switch(files.config, "add_bos_token"), _switch(files.config, "add_eos_token")
    return PieceTokenizer(
        model,
        encode_run,
        Manner(
            add_bos=add_bos is not False,
            add_eos=add_eos is True,
            prefix_every_run=files.config.get("legacy") is not False,
            added=special | added,
        ),
        bos_id=bos,
        eos_ids=files.eos_ids(eos) if eos_ids is None else eos_ids,
        chat_template=files.chat_template(),
        warnings=files.warnings,
    )


# --- JSON -------------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    """{} where there is no such file. Raises ConfigInvalid when it can't be read."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise _invalid(f"{path} can't be read: {error}") from None
    if not isinstance(value, dict):
        raise _invalid(f"{path}: must be a JSON object")
    return value


def _token_text(entry: object) -> str | None:
    """A token is written as a string or as an object with a "content"."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _switch(config: dict[str, Any], key: str) -> bool | None:
    value = config.get(key)
    return value if isinstance(value, bool) else None


def _invalid(message: str) -> ConfigInvalid:
    return ConfigInvalid([Problem("model_dir", message)])
