"""Sentencepiece vocabularies: run by the sentencepiece library itself, or converted to a BPE of `tokenizers`.

Both cut a text at the added tokens first and encode each run between them on its own.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, models

from lightllmd.text.fast import encode_one
from lightllmd.text.interface import Tokenizer
from lightllmd.text.pairs import PairFrame
from lightllmd.text.vocabulary import (
    BYTEWISE,
    SPACE_MARK,
    LeadingSpace,
    Vocabulary,
    require_token_id,
    sentencepiece_texts,
)
from lightllmd.weights.model_files import read_file

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of pieces; GGUF uses the same numbers
_BPE = 2  # TrainerSpec.ModelType
MAX_MODEL = 16 << 20  # bytes of a .model file; the largest known has 5 MB
MAX_FIELDS = 4_000_000  # in it

_SPACE = re.compile(r"\s*")

RunEncoder = Callable[[str, bool], list[int]]  # (a text without added tokens, whether a space is put in front) -> ids


@dataclass(frozen=True)
class PieceModel:
    """A sentencepiece model, as sentencepiece_model.proto describes it."""

    pieces: list[str]
    scores: list[float]
    kinds: list[int]
    model_type: int = _BPE
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    plain: bool = True  # no normalisation but spaces to marks

    @property
    def is_plain_bpe(self) -> bool:
        """Whether the converted form encodes exactly as the library does."""
        usual = self.plain and not self.remove_extra_whitespaces and UNUSED not in self.kinds
        return self.model_type == _BPE and usual

    @property
    def leading_space(self) -> LeadingSpace:
        """What decoding does with the space that encoding put in front."""
        if self.remove_extra_whitespaces:
            return LeadingSpace.STRIP_ALL
        return LeadingSpace.STRIP_ONE if self.add_dummy_prefix else LeadingSpace.KEEP


@dataclass(frozen=True)
class Added:
    """A token that is matched in a text as a whole."""

    content: str
    special: bool = True
    lstrip: bool = False  # white space before it belongs to it
    rstrip: bool = False


@dataclass(frozen=True)
class Manner:
    """How a model wants its special tokens."""

    add_bos: bool = True
    add_eos: bool = False
    prefix_every_run: bool = True  # a space in front of each run, or (transformers' legacy=False) of the first only
    added: dict[int, Added] = field(default_factory=dict)


class PieceTokenizer(Tokenizer):
    """A sentencepiece model (Kudo and Richardson 2018), by the library or a converted form that encodes alike."""

    def __init__(
        self,
        model: PieceModel,
        encode_run: RunEncoder,
        manner: Manner,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        **rest: Any,
    ) -> None:
        eos_ids = list(eos_ids)
        added = {
            number: Added(model.pieces[number])
            for number, kind in enumerate(model.kinds)
            if kind in (CONTROL, UNKNOWN) and model.pieces[number]
        }
        added |= manner.added
        super().__init__(_vocabulary(model, added), bos_id=bos_id, eos_ids=eos_ids, **rest)
        self._encode_run = encode_run
        self._model = model
        self._every_run = manner.prefix_every_run
        self._before = [bos_id] if manner.add_bos and bos_id is not None else []
        self._after = eos_ids[:1] if manner.add_eos else []
        self._added = added
        self._added_ids = {token.content: number for number, token in added.items()}
        self._added_pattern = re.compile(_any_of(self._added_ids)) if added else None

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        at = 0  # everything before it is encoded
        for match in self._added_pattern.finditer(text) if self._added_pattern else ():
            number = self._added_ids[match[0]]
            token = self._added[number]
            run = text[at : match.start()]
            ids += self._run(run.rstrip() if token.lstrip else run, at == 0)
            ids.append(number)
            space = _SPACE.match(text, match.end()) if token.rstrip else None
            at = space.end() if space else match.end()
        ids += self._run(text[at:], at == 0)
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    @property
    def pair_frame(self) -> PairFrame:
        return PairFrame(self._before, [*self._after, *self._before], self._after)

    def _run(self, text: str, first: bool) -> list[int]:
        return self._encode_run(text, self._model.add_dummy_prefix and (self._every_run or first)) if text else []


def _any_of(words: Iterable[str]) -> str:
    """A regular expression for the longest of the words at a place, as a trie: its cost does not grow with them."""
    trie: dict[str, Any] = {}
    for word in words:
        node = trie
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = {}

    def unfold(node: dict[str, Any]) -> str:
        branches = [re.escape(letter) + unfold(child) for letter, child in node.items() if letter]
        if not branches:
            return ""
        body = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
        return f"(?:{body})?" if "" in node else body

    return unfold(trie)


def _vocabulary(model: PieceModel, added: dict[int, Added]) -> Vocabulary:
    tokens: list[str | None] = [*model.pieces]
    require_token_id(max(added, default=0))
    tokens += [None] * (max(added, default=-1) + 1 - len(tokens))
    for number, token in added.items():
        tokens[number] = token.content
    byte_ids = [number for number, kind in enumerate(model.kinds) if kind == BYTE and number not in added]
    texts, fragments = sentencepiece_texts(tokens, byte_ids)
    return Vocabulary(
        tokens,
        frozenset(number for number, token in added.items() if token.special),
        frozenset(added),
        texts=texts,
        fragments=fragments,
        byte_errors=BYTEWISE,
        leading_space=model.leading_space,
    )


# --- ways to encode a run ------------------------------------------------------------------------------------------


def library_encoder(path: Path, model: PieceModel) -> RunEncoder:
    """The sentencepiece library on the model's own file: exact for every kind of model."""
    import sentencepiece

    raw = read_file(path, MAX_MODEL)
    as_trained = sentencepiece.SentencePieceProcessor(model_proto=raw)
    # Protocol buffers merge what is said twice: normalizer_spec { add_dummy_prefix: false }
    without_prefix = sentencepiece.SentencePieceProcessor(model_proto=raw + b"\x1a\x02\x18\x00")

    def encode(text: str, prefix: bool) -> list[int]:
        return (as_trained if prefix else without_prefix).encode(text)

    return encode


def converted_encoder(model: PieceModel) -> RunEncoder:
    """The same merges as a BPE of `tokenizers`: exact for a plain BPE model (`is_plain_bpe`), and several times faster.

    Sentencepiece merges the pair whose union has the best score; so the merges of a piece are all its cuts into two
    pieces, and pieces rank by score.
    """
    vocabulary = {piece: number for number, piece in enumerate(model.pieces)}
    ranked: list[tuple[float, str, str]] = []
    for piece, number in vocabulary.items():
        if model.kinds[number] in (CONTROL, UNKNOWN, BYTE, USER_DEFINED):
            continue
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        known = [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
        known.sort(key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
        ranked += [(model.scores[number], left, right) for left, right in known]
    ranked.sort(key=lambda entry: -entry[0])  # stable: cuts of one piece keep their order
    unknown = next((model.pieces[n] for n, kind in enumerate(model.kinds) if kind == UNKNOWN), None)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocabulary,
            [(left, right) for _, left, right in ranked],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=BYTE in model.kinds,
        )
    )
    backend.add_tokens(
        [AddedToken(model.pieces[n], normalized=False) for n, kind in enumerate(model.kinds) if kind == USER_DEFINED]
    )

    def encode(text: str, prefix: bool) -> list[int]:
        marked = text.replace(" ", SPACE_MARK)
        return encode_one(backend, SPACE_MARK + marked if prefix else marked, False)

    return encode


# --- the model file ---------------------------------------------------------------------------------------------------


def read_model(path: Path) -> PieceModel:
    """Reads a .model file (https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto).

    Raises ValueError when it is something else, ConfigInvalid when it is no file that can be read.
    """
    model = PieceModel([], [], [], model_type=1)  # a unigram model where the file doesn't say
    escape = True
    try:
        for number, value in _fields(read_file(path, MAX_MODEL)):
            if number == 1:
                piece = dict(_fields(value))
                model.pieces.append(bytes(piece[1]).decode())
                model.scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                model.kinds.append(piece.get(3, NORMAL))
            elif number == 2:
                model = replace(model, model_type=dict(_fields(value)).get(3, 1))
            elif number == 3:
                spec = dict(_fields(value))
                escape = bool(spec.get(5, 1))
                model = replace(
                    model,
                    add_dummy_prefix=bool(spec.get(3, 1)),
                    remove_extra_whitespaces=bool(spec.get(4, 1)),
                    plain=escape and not spec.get(2),
                )
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise ValueError(f"{path} is no sentencepiece model ({error})") from None
    if not model.pieces:
        raise ValueError(f"{path} is no sentencepiece model (no pieces)")
    return model


def _fields(data: bytes | memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer message: int for varints, bytes for everything else."""
    view = memoryview(data)
    at = count = 0
    while at < len(view):
        count += 1
        if count > MAX_FIELDS:
            raise ValueError(f"more than {MAX_FIELDS} fields")
        key, at = _varint(view, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(view, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(view, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(view):
            raise ValueError("truncated")
        yield number, view[at : at + size]
        at += size


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("varint too long")
