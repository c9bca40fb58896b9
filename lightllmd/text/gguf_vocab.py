"""The tokenizer that a GGUF file carries in its metadata.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "Tokenizer". Token types are sentencepiece's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken

from lightllmd.errors import ConfigInvalid, Problem
from lightllmd.text.byte_level import PRE_TOKENIZERS, byte_level_bpe
from lightllmd.text.chat_template import ChatTemplate
from lightllmd.text.fast import FastTokenizer
from lightllmd.text.interface import Tokenizer
from lightllmd.text.spm import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Added,
    Manner,
    PieceModel,
    PieceTokenizer,
    converted_encoder,
)

_PREFIX = "tokenizer.ggml."


def open_metadata(metadata: dict[str, Any], mode: str = "auto", eos_ids: Sequence[int] | None = None) -> Tokenizer:
    """Raises ConfigInvalid when the metadata has no vocabulary that this program can run."""
    vocabulary = _Metadata(metadata)
    if mode == "slow":
        vocabulary.warnings.append(
            "tokenizer_mode slow: a GGUF file holds no sentencepiece model; the fast tokenizer is used"
        )
    if vocabulary.kind == "gpt2":
        return _open_byte_level(vocabulary, eos_ids)
    if vocabulary.kind == "llama":
        return _open_pieces(vocabulary, eos_ids)
    raise _invalid(f"tokenizer.ggml.model is {vocabulary.kind!r}; supported are 'gpt2' and 'llama'")


class _Metadata:
    """The tokenizer's part of the metadata, checked."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        self._values = metadata
        self.warnings: list[str] = []
        self.kind = str(self.get("model", "missing"))
        self.tokens: list[str] = self.get("tokens") or []
        if not self.tokens:
            raise _invalid("tokenizer.ggml.tokens is missing: the GGUF file carries no tokenizer")
        self.types: list[int] = self.get("token_type") or [NORMAL] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise _invalid(f"tokenizer.ggml.token_type has {len(self.types)} entries for {len(self.tokens)} tokens")
        self.bos_id = self.number("bos")
        ends = [self.number(role) for role in ("eos", "eot", "eom")]
        self.end_ids = list(dict.fromkeys(number for number in ends if number is not None))

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(_PREFIX + key, default)

    def number(self, role: str) -> int | None:
        value = self.get(f"{role}_token_id")
        return value if isinstance(value, int) and 0 <= value < len(self.tokens) else None

    def switch(self, key: str, default: bool) -> bool:
        return bool(self.get(key, default))

    def added(self) -> dict[int, Added]:
        """Tokens that are matched as a whole. The ones that end a generation are special whatever their type says."""
        ends = set(self.end_ids)
        return {
            number: Added(self.tokens[number], special=kind in (CONTROL, UNKNOWN) or number in ends)
            for number, kind in enumerate(self.types)
            if self.tokens[number] and (kind in (CONTROL, UNKNOWN, USER_DEFINED) or number in ends)
        }

    def common(self, eos_ids: Sequence[int] | None) -> dict[str, Any]:
        return {
            "bos_id": self.bos_id,
            "eos_ids": self.end_ids if eos_ids is None else eos_ids,
            "chat_template": self._chat_template(),
            "warnings": self.warnings,
        }

    def _chat_template(self) -> ChatTemplate | None:
        sources = {"default": self._values.get("tokenizer.chat_template")}
        for name in self._values.get("tokenizer.chat_templates") or []:
            sources[str(name)] = self._values.get(f"tokenizer.chat_template.{name}")
        texts = {name: text for name, text in sources.items() if isinstance(text, str)}
        if not texts:
            return None
        roles = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        numbers = {name: self.number(role) for role, name in roles.items()}
        special = {name: self.tokens[number] for name, number in numbers.items() if number is not None}
        try:
            return ChatTemplate(texts, special)
        except (ValueError, RecursionError) as error:
            self.warnings.append(f"{error}; chat requests will be refused")
            return None


def _open_byte_level(vocabulary: _Metadata, eos_ids: Sequence[int] | None) -> FastTokenizer:
    name = vocabulary.get("pre")
    if name is None or name == "default":
        vocabulary.warnings.append(
            f"tokenizer.ggml.pre is {name or 'missing'}: GPT-2's pre-tokenizer is used, it may not be the model's own"
        )
    pre_tokenizer = PRE_TOKENIZERS.get(name or "default")
    if pre_tokenizer is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise _invalid(f"tokenizer.ggml.pre is {name!r}, a pre-tokenizer that is not known; known are {known}")
    numbers = {token: number for number, token in enumerate(vocabulary.tokens)}
    try:
        merges = [(left, right) for left, right in (merge.split(" ") for merge in vocabulary.get("merges") or [])]
        backend = byte_level_bpe(numbers, merges, pre_tokenizer)
    except ValueError as error:
        raise _invalid(f"tokenizer.ggml.merges: {error}") from None
    for token in vocabulary.added().values():
        entry = AddedToken(token.content, normalized=False)
        (backend.add_special_tokens if token.special else backend.add_tokens)([entry])
    return FastTokenizer(
        backend,
        add_bos=vocabulary.switch("add_bos_token", pre_tokenizer.add_bos),
        add_eos=vocabulary.switch("add_eos_token", False),
        **vocabulary.common(eos_ids),
    )


def _open_pieces(vocabulary: _Metadata, eos_ids: Sequence[int] | None) -> PieceTokenizer:
    scores = vocabulary.get("scores") or []
    if len(scores) != len(vocabulary.tokens):
        raise _invalid(f"tokenizer.ggml.scores has {len(scores)} entries for {len(vocabulary.tokens)} tokens")
    model = PieceModel(
        vocabulary.tokens,
        scores,
        vocabulary.types,
        add_dummy_prefix=vocabulary.switch("add_space_prefix", True),
        remove_extra_whitespaces=False,
    )
    manner = Manner(
        add_bos=vocabulary.switch("add_bos_token", True),
        add_eos=vocabulary.switch("add_eos_token", False),
        added=vocabulary.added(),
    )
    return PieceTokenizer(model, converted_encoder(model), manner, **vocabulary.common(eos_ids))


def _invalid(message: str) -> ConfigInvalid:
    return ConfigInvalid([Problem("model_dir", message)])
