"""From two texts to the token ids of one prompt. Called as `Encoder` is; results are arrays for the same reason."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from lightllmd.errors import InvalidRequest
from lightllmd.requests.asked import TextPair
from lightllmd.requests.encoding import FIRST_LOOK, Encoder
from lightllmd.requests.faults import naming
from lightllmd.requests.limits import RequestLimits
from lightllmd.text.interface import Tokenizer
from lightllmd.text.pairs import PairCut

Result = TypeVar("Result")


class PairEncoder:
    """Of one plan."""

    def __init__(self, tokenizer: Tokenizer, limits: RequestLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._encoder = Encoder(tokenizer, limits)

    def encode(self, pairs: Sequence[TextPair], fields: Sequence[str], cut: PairCut) -> list[array[int]]:
        """`fields`: the name of each pair's second text. By the model's template for pairs where it has one, which says
        all that is around the texts; else as transformers encodes a text and its pair. Raises InvalidRequest, which
        names the field, for what is no valid Unicode, too long, or too much in all."""
        template = self._tokenizer.chat_template
        joined = self._templated if template is not None and template.joins_pairs else self._framed
        if cut.both is not None and cut.both < 0:
            cut = replace(cut, both=self._limits.max_req_input_len)
        encoded, total = [], 0
        for ids, field in zip(joined(pairs, fields, cut), fields, strict=True):
            encoded.append(self._encoder.checked(ids, field, False))
            total += len(ids)
            self._limits.paired(total, field)
        return encoded

    def _framed(self, pairs: Sequence[TextPair], fields: Sequence[str], cut: PairCut) -> Iterator[list[int]]:
        frame = self._tokenizer.pair_frame
        first = _Once(lambda pair: self._ids(pair.first, pair.first_field, cut.cuts))
        for some in _in_parts(pairs):
            seconds = self._batch([pairs[at].second for at in some], [fields[at] for at in some], cut.cuts)
            for at, second in zip(some, seconds, strict=True):
                yield frame.join(*cut.apply(first(pairs[at]), second, frame.size))

    def _templated(self, pairs: Sequence[TextPair], fields: Sequence[str], cut: PairCut) -> Iterator[list[int]]:
        template = self._tokenizer.chat_template
        assert template is not None
        first = _Once(lambda pair: self._shortened(pair.first, pair.first_field, cut, cut.first))
        for pair, field in zip(pairs, fields, strict=True):
            second = self._shortened(pair.second, field, cut, cut.second)
            with naming(field):
                text = template.render_pair(first(pair), second, field=field)
            yield [*cut.kept(self._ids(text, field, cut.both is not None), cut.both)]

    def _shortened(self, text: str, field: str, cut: PairCut, most: int | None) -> str:
        """`most` tokens of a text, as text."""
        if most is None or len(ids := self._ids(text, field, True)) <= most:
            return text
        spans = self._tokenizer.spans(text, add_special_tokens=False)
        if spans is None or most == 0:
            return self._tokenizer.decode(cut.kept(ids, most), skip_special_tokens=False)
        return text[spans[-most][0] :] if cut.from_left else text[: spans[most - 1][1]]

    def _ids(self, text: str, field: str, cut: bool) -> list[int]:
        """Without special tokens."""
        with naming(field):
            return self._encoder.bounded(text, field, False, cut)

    def _batch(self, texts: Sequence[str], fields: Sequence[str], cut: bool) -> list[list[int]]:
        if sum(map(len, texts)) <= FIRST_LOOK:
            try:
                return self._tokenizer.encode_batch(texts, add_special_tokens=False)
            except InvalidRequest:
                pass  # one by one it is told which
        return [self._ids(text, field, cut) for text, field in zip(texts, fields, strict=True)]


class _Once(Generic[Result]):
    """Work on a pair's first text that is not done again while the next pairs have the same."""

    def __init__(self, work: Callable[[TextPair], Result]) -> None:
        self._work = work
        self._last: tuple[str, Result] | None = None

    def __call__(self, pair: TextPair) -> Result:
        if self._last is None or self._last[0] != pair.first:
            self._last = pair.first, self._work(pair)
        return self._last[1]


def _in_parts(pairs: Sequence[TextPair]) -> Iterator[range]:
    """Indices of pairs whose second texts are tokenised at once: few enough that their tokens take little memory."""
    first, size = 0, 0
    for at, pair in enumerate(pairs):
        if at > first and size + len(pair.second) > FIRST_LOOK:
            yield range(first, at)
            first, size = at, 0
        size += len(pair.second)
    if pairs:
        yield range(first, len(pairs))
