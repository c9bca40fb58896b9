"""Tokenizers that the `tokenizers` library runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import tokenizers

from lightllmd.text.interface import Tokenizer
from lightllmd.text.offsets import NOWHERE, Span
from lightllmd.text.vocabulary import (
    BYTEWISE,
    SPACE_MARK,
    LeadingSpace,
    Vocabulary,
    byte_level_texts,
    require_token_id,
    sentencepiece_texts,
)

BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class FastTokenizer(Tokenizer):
    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_ids: Iterable[int] = (),
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        **rest: Any,
    ) -> None:
        """`special_ids` come in addition to those that the backend knows. `add_bos`, `add_eos`: what encoding with
        special tokens puts around a text; None leaves it to the backend's post-processor."""
        backend.no_truncation()
        backend.no_padding()
        eos_ids = list(eos_ids)
        super().__init__(read_vocabulary(backend, special_ids), bos_id=bos_id, eos_ids=eos_ids, **rest)
        self._backend = backend
        self._around = self._brackets(add_bos, add_eos, bos_id, eos_ids[0] if eos_ids else None)

    def _brackets(
        self, add_bos: bool | None, add_eos: bool | None, bos_id: int | None, eos_id: int | None
    ) -> tuple[list[int], list[int]] | None:
        """(ids before, ids after) a text; None where the backend's post-processor already does what is asked for."""
        bare = self._backend.encode("a", add_special_tokens=False).ids
        full = self._backend.encode("a", add_special_tokens=True).ids
        begins = bos_id is not None and full[:1] == [bos_id] and bare[:1] != [bos_id]
        ends = eos_id is not None and full[-1:] == [eos_id] and bare[-1:] != [eos_id]
        want_begin = begins if add_bos is None or bos_id is None else add_bos
        want_end = ends if add_eos is None or eos_id is None else add_eos
        if (want_begin, want_end) == (begins, ends):
            return None
        return [bos_id] * want_begin if bos_id is not None else [], [eos_id] * want_end if eos_id is not None else []

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if self._around is None:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [*self._around[0], *ids, *self._around[1]] if add_special_tokens else ids

    def spans(self, text: str, add_special_tokens: bool = True) -> list[Span]:
        around = self._around if add_special_tokens else None
        inner = add_special_tokens and around is None
        [encoding] = self._backend.encode_batch([text], add_special_tokens=inner)
        before, after = around or ([], [])
        return [*[NOWHERE] * len(before), *encoding.offsets, *[NOWHERE] * len(after)]

    def _encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        around = self._around if add_special_tokens else None
        inner = add_special_tokens and around is None
        batch = [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=inner)]
        return batch if around is None else [[*around[0], *ids, *around[1]] for ids in batch]


def read_vocabulary(backend: tokenizers.Tokenizer, special_ids: Iterable[int] = ()) -> Vocabulary:
    """A text per token where the backend's decoder treats each token by itself, else the decoder as it is."""
    by_text = backend.get_vocab(with_added_tokens=True)
    require_token_id(max(by_text.values(), default=0))
    tokens: list[str | None] = [None] * (max(by_text.values(), default=-1) + 1)
    for text, number in by_text.items():
        tokens[number] = text
    added = backend.get_added_tokens_decoder()
    special = frozenset(special_ids).union(number for number, token in added.items() if token.special)
    vocabulary = partial(Vocabulary, tokens, special, special.union(added))

    steps = _decoder_steps(backend)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        texts, fragments = byte_level_texts(tokens)
        return vocabulary(texts=texts, fragments=fragments)
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and _is_mark_to_space(steps[0]):
        lead = _leading_space(steps[3:])
        if lead is not None:
            byte_ids = [n for n, token in enumerate(tokens) if token and n not in added and BYTE_PIECE.fullmatch(token)]
            texts, fragments = sentencepiece_texts(tokens, byte_ids)
            return vocabulary(texts=texts, fragments=fragments, byte_errors=BYTEWISE, leading_space=lead)
    return vocabulary(decode=partial(backend.decode, skip_special_tokens=False))


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder's parts as tokenizer.json describes them, sequences unfolded."""

    def unfold(step: dict[str, Any]) -> list[dict[str, Any]]:
        return [leaf for inner in step["decoders"] for leaf in unfold(inner)] if step["type"] == "Sequence" else [step]

    if backend.decoder is None:
        return []
    return unfold(json.loads(backend.decoder.__getstate__()))  # a component's state is its JSON


def _is_mark_to_space(step: dict[str, Any]) -> bool:
    return step.get("pattern") == {"String": SPACE_MARK} and step.get("content") == " "


def _leading_space(rest: list[dict[str, Any]]) -> LeadingSpace | None:
    """What the steps after Fuse do to a text's first space; None for anything else than that."""
    if not rest:
        return LeadingSpace.KEEP
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return LeadingSpace.STRIP_ONE if rest == [strip] else None
