"""The small files of a model folder as bytes, text and JSON: each read with a bound, and every refusal names its file.

All that reads a model folder (the probe, the tokenizers) reads it here, so that no two readers differ in strictness. No
torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lightllmd.config.files import read_bytes
from lightllmd.errors import ConfigInvalid, LightllmdError, Problem

MAX_CONFIG = 4 << 20  # bytes: config.json, generation_config.json; the plan carries the first one to every child
MAX_JSON = 8 << 20  # tokenizer_config.json and other lists of tokens; the largest known has 1.2 MB
MAX_TEMPLATE = 1 << 20  # a chat template
MAX_VOCABULARY = 64 << 20  # tokenizer.json, vocab.json, merges.txt, an index of weights; the largest known has 34 MB
MAX_TEMPLATES = 64  # files in additional_chat_templates

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_WORDS = "is a Git LFS pointer, not the file that it stands for (git lfs pull fetches it)"

T = TypeVar("T")


def invalid(message: str) -> ConfigInvalid:
    """The error of a `model_dir` that can't be served."""
    return ConfigInvalid([Problem("model_dir", message)])


TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def text_files(directory: Path) -> list[Path]:
    """All that a model folder may say beside its weights; those of fixed names whether they are there or not."""
    found = [*directory.glob("*.model"), *(directory / "additional_chat_templates").glob("*.jinja")]
    return [*(directory / name for name in TEXT_FILES), *sorted(found)]


def present(path: Path) -> bool:
    """Whether anything is there, a file or not: what is there and can't be read is refused, never passed over."""
    return os.path.lexists(path)


def read_file(path: Path, limit: int) -> bytes:
    """Raises ConfigInvalid when it is no regular file, can't be read, is larger than `limit` or an LFS pointer."""
    try:
        body = read_bytes(path, limit)
    except OSError as error:
        raise invalid(f"{path} can't be read: {error.strerror}") from None
    if body.startswith(LFS_POINTER):
        raise invalid(f"{path} {LFS_WORDS}")
    return body


def read_text(path: Path, limit: int = MAX_TEMPLATE) -> str:
    """UTF-8, with or without a byte order mark. Raises ConfigInvalid."""
    try:
        return read_file(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise invalid(f"{path}: byte {error.start} is not valid UTF-8") from None


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """A JSON object. NaN and Infinity are taken as Python writes them. Raises ConfigInvalid."""
    text = read_text(path, limit)
    try:
        value = json.loads(text)
    except RecursionError:
        raise invalid(f"{path}: no valid JSON: nested too deeply") from None
    except ValueError as error:
        raise invalid(f"{path}: no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise invalid(f"{path}: no JSON object")
    return value


def read_typed(path: Path, form: type[T], limit: int = MAX_JSON) -> T:
    """A JSON object of that form; of what the form does not name nothing is kept. Raises ConfigInvalid, which names
    the place of a wrong type."""
    return typed(path, read_json(path, limit), form)


def typed(path: Path, value: object, form: type[T]) -> T:
    """`value`, which was read from `path`, as a `form`. Raises what `read_listed` raises."""
    try:
        return msgspec.convert(value, form)
    except msgspec.ValidationError as error:
        raise invalid(f"{path}: {error}") from None


def read_listed(path: Path, form: type[T], limit: int = MAX_VOCABULARY) -> T:
    """As `read_typed`, for large files of other programs: what the form does not name costs no memory, and NaN is
    refused."""
    body = read_file(path, limit)
    try:
        return msgspec.json.decode(body, type=form)
    except RecursionError:
        raise invalid(f"{path}: no valid JSON: nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # a ValidationError is one
        raise invalid(f"{path}: {error}") from None


@contextmanager
def usable(path: Path) -> Iterator[None]:
    """Whatever a library raises because of what is in a file names that file, as ConfigInvalid; a panic of the
    `tokenizers` library, which is no Exception, too."""
    try:
        yield
    except (LightllmdError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise invalid(f"{path} can't be used: {_short(f'{type(error).__name__}: {error}', 300)}") from None


# --- forms --------------------------------------------------------------------------------------------------------


class Token(msgspec.Struct, frozen=True):
    """As tokenizer_config.json and tokenizer.json write an added token."""

    content: str
    id: int | None = None
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False


class NamedTemplate(msgspec.Struct, frozen=True):
    """One of several chat templates of a tokenizer_config.json."""

    name: str
    template: str


class ChatTemplateFile(msgspec.Struct, frozen=True):
    """chat_template.json."""

    chat_template: str | None = None


class TokenizerConfig(msgspec.Struct, frozen=True):
    """tokenizer_config.json and special_tokens_map.json, as far as anything here depends on them."""

    chat_template: str | list[NamedTemplate] | dict[str, str] | None = None
    added_tokens_decoder: dict[str, Token] | None = None
    tokenizer_class: str | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    legacy: bool | None = None
    bos_token: str | Token | None = None
    eos_token: str | Token | None = None
    unk_token: str | Token | None = None
    sep_token: str | Token | None = None
    pad_token: str | Token | None = None
    cls_token: str | Token | None = None
    mask_token: str | Token | None = None
    additional_special_tokens: list[str | Token] | None = None
    extra_special_tokens: list[str | Token] | dict[str, str | Token] | None = None


class TokenizerJson(msgspec.Struct, frozen=True):
    """tokenizer.json, but for the vocabulary, which the `tokenizers` library reads."""

    added_tokens: list[Token] = []


class GenerationConfig(msgspec.Struct, frozen=True):
    """What is read of generation_config.json, and of config.json likewise."""

    eos_token_id: int | list[int] | None = None


def text_of(token: str | Token | None) -> str | None:
    """The text of a special token, in whichever form the file writes it."""
    return token.content if isinstance(token, Token) else token


def tokenizer_config(directory: Path) -> TokenizerConfig:
    """tokenizer_config.json over special_tokens_map.json; both may be missing. Raises ConfigInvalid."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = directory / name
        if present(path):
            found = read_json(path)
            typed(path, found, TokenizerConfig)
            merged |= found
    return typed(directory / "tokenizer_config.json", merged, TokenizerConfig)


def eos_token_ids(path: Path) -> list[int]:
    """What config.json or generation_config.json names, if it is there. Raises ConfigInvalid."""
    if not present(path):
        return []
    return typed_eos_ids(path, read_json(path, MAX_CONFIG))


def typed_eos_ids(path: Path, value: dict[str, Any]) -> list[int]:
    """Those that `value`, which was read from `path`, names. Raises ConfigInvalid."""
    given = typed(path, value, GenerationConfig).eos_token_id
    ids = given if isinstance(given, list) else [] if given is None else [given]
    for number in ids:
        if not 0 <= number < 1 << 31:
            raise invalid(f"{path}: eos_token_id {_short(number)} is no token id")
    return ids


def image_processor(directory: Path) -> tuple[dict[str, Any], Path]:
    """The settings of a model's image processor, and the file that they are read from: preprocessor_config.json, or the
    part of processor_config.json that transformers 5 keeps them in. Empty where there is neither. Raises
    ConfigInvalid."""
    path, whole = directory / "preprocessor_config.json", directory / "processor_config.json"
    if present(path):
        return read_json(path), path
    if present(whole):
        part = read_json(whole).get("image_processor")
        if isinstance(part, dict):
            return part, whole
    return {}, directory / "config.json"


def added_tokens(directory: Path, config: TokenizerConfig) -> dict[int, Token]:
    """Tokens outside the learnt vocabulary by id, from whichever file lists them. Raises ConfigInvalid."""
    if config.added_tokens_decoder:
        path = directory / "tokenizer_config.json"
        return {_id(path, number): token for number, token in config.added_tokens_decoder.items()}
    path = directory / "added_tokens.json"
    if present(path):
        return {_id(path, number): Token(text) for text, number in read_typed(path, dict[str, int]).items()}
    return {}


def _id(path: Path, number: str | int) -> int:
    if isinstance(number, int) and 0 <= number < 1 << 31:
        return number
    if isinstance(number, str) and number.isascii() and number.isdecimal() and len(number) <= 9:
        return int(number)
    raise invalid(f"{path}: {_short(number)} is no token id")


def _short(value: object, length: int = 40) -> str:
    text = str(value).replace("\n", " ")
    return text if len(text) <= length else f"{text[: length - 1]}…"


def chat_templates(directory: Path, config: TokenizerConfig) -> dict[str, str]:
    """Template texts by name; a file of its own wins over the entry in tokenizer_config.json. Raises ConfigInvalid."""
    given = config.chat_template
    legacy = directory / "chat_template.json"
    if not given and present(legacy):
        given = read_typed(legacy, ChatTemplateFile, MAX_TEMPLATE).chat_template
    templates: dict[str, str] = {}
    if isinstance(given, str):
        templates["default"] = given
    elif isinstance(given, list):
        templates = {one.name: one.template for one in given}
    elif isinstance(given, dict):
        templates = dict(given)
    main = directory / "chat_template.jinja"
    if present(main):
        templates["default"] = read_text(main)
    others = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    if len(others) > MAX_TEMPLATES:
        raise invalid(
            f"{directory / 'additional_chat_templates'} holds {len(others)} templates, at most {MAX_TEMPLATES}"
        )
    return templates | {path.stem: read_text(path) for path in others}
