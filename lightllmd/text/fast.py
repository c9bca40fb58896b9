"""Tokenizers that the `tokenizers` library runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import tokenizers
from tokenizers import models

from lightllmd.text.interface import Tokenizer
from lightllmd.text.offsets import NOWHERE, Span
from lightllmd.text.pairs import NO_FRAME, PairFrame
from lightllmd.text.vocabulary import (
    BYTEWISE,
    SPACE_MARK,
    LeadingSpace,
    Vocabulary,
    byte_level_texts,
    require_token_id,
    sentencepiece_texts,
)

_SHORT = 1 << 10  # characters; for fewer a call by itself is quicker
_COMPOSED = 4  # characters that Unicode's composed form makes one of, at most
BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class FastTokenizer(Tokenizer):
    """Any tokenizer that the library `tokenizers` runs: a tokenizer.json, or one that is built from other files."""

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
        self._longest = _longest_token(backend, self.vocabulary)
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

    @property
    def longest_token(self) -> int | None:
        return self._longest

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if self._around is None:
            return encode_one(self._backend, text, add_special_tokens)
        ids = encode_one(self._backend, text, False)
        return [*self._around[0], *ids, *self._around[1]] if add_special_tokens else ids

    @property
    def pair_frame(self) -> PairFrame:
        if self._around is not None:
            before, after = self._around
            return PairFrame(before, [*after, *before], after)
        # The post-processor is asked what it does; texts of one letter are at least a token each.
        encoding = self._backend.encode("a", "b", add_special_tokens=True)
        ids, places = encoding.ids, encoding.sequence_ids
        first = [at for at, text in enumerate(places) if text == 0]
        second = [at for at, text in enumerate(places) if text == 1]
        if not first or not second:  # a vocabulary without letters
            return NO_FRAME
        return PairFrame(ids[: first[0]], ids[first[-1] + 1 : second[0]], ids[second[-1] + 1 :])

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


def encode_one(backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Ids of one text. The library's lock is released for a long one."""
    if len(text) <= _SHORT:
        return backend.encode(text, add_special_tokens=add_special_tokens).ids
    # It makes no offsets, which take most of the time, and lets other threads run.
    return backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids


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


def _longest_token(backend: tokenizers.Tokenizer, vocabulary: Vocabulary) -> int | None:
    """Known for BPE models that have a token for every byte, where nothing of a text is dropped before."""
    texts, bytes_of = vocabulary.texts, vocabulary.token_bytes
    added = backend.get_added_tokens_decoder().values()
    if not texts or not isinstance(backend.model, models.BPE) or any(token.lstrip or token.rstrip for token in added):
        return None
    normalizers = _steps(backend.normalizer, "normalizers")
    cuts = _steps(backend.pre_tokenizer, "pretokenizers")
    kinds = {step["type"] for step in cuts}
    if not all(step["type"] == "NFC" or _keeps_length(step) for step in normalizers):
        return None
    if not kinds <= {"ByteLevel", "Digits", "Metaspace", "Split"}:
        return None
    if any(step.get("behavior") == "Removed" for step in cuts):
        return None
    if "ByteLevel" not in kinds and not backend.model.byte_fallback:
        return None
    spelt = [bytes_of(number) or b"" for number in range(len(texts))]
    if len({raw for raw in spelt if len(raw) == 1}) < 256:
        return None
    longest = max(map(len, spelt))
    return longest * (_COMPOSED if any(step["type"] == "NFC" for step in normalizers) else 1)


def _keeps_length(step: dict[str, Any]) -> bool:
    """A normalising step that leaves a text as long as it was, or longer."""
    pattern = step.get("pattern", {}).get("String")
    return step["type"] == "Prepend" or (
        step["type"] == "Replace" and pattern is not None and len(step["content"]) >= len(pattern)
    )


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    return _steps(backend.decoder, "decoders")


def _steps(component: Any, inner: str) -> list[dict[str, Any]]:
    """A component's parts as tokenizer.json describes them, sequences (whose parts are named `inner`) unfolded."""

    def unfold(step: dict[str, Any]) -> list[dict[str, Any]]:
        return [leaf for part in step[inner] for leaf in unfold(part)] if step["type"] == "Sequence" else [step]

    return [] if component is None else unfold(json.loads(component.__getstate__()))  # its state is its JSON


def _is_mark_to_space(step: dict[str, Any]) -> bool:
    return step.get("pattern") == {"String": SPACE_MARK} and step.get("content") == " "


def _leading_space(rest: list[dict[str, Any]]) -> LeadingSpace | None:
    """What the steps after Fuse do to a text's first space; None for anything else than that."""
    if not rest:
        return LeadingSpace.KEEP
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return LeadingSpace.STRIP_ONE if rest == [strip] else None
