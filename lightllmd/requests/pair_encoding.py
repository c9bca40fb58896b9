"""From two texts to the token ids of one prompt. Called as `Encoder` is; results are arrays for the same reason."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from lightllmd.errors import InvalidRequest
from lightllmd.requests.asked import FieldOfTexts, TextPairs
from lightllmd.requests.encoding import FIRST_LOOK, Encoder
from lightllmd.requests.faults import naming
from lightllmd.requests.limits import RequestLimits
from lightllmd.text.interface import Tokenizer
from lightllmd.text.pairs import PairCut

_SPARE = 64  # tokens
Result = TypeVar("Result")


class PairEncoder:
    """Of one plan."""

    def __init__(self, tokenizer: Tokenizer, limits: RequestLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._encoder = Encoder(tokenizer, limits)

    def encode(self, pairs: TextPairs, cut: PairCut) -> list[array[int]]:
        """The ids of each pair. By the model's template for pairs where it has one, which says all that is around the
        texts; else as transformers encodes a text and its pair. Raises InvalidRequest, which names the field, for what
        is no valid Unicode, too long, or too much in all."""
        template = self._tokenizer.chat_template
        templated = template is not None and template.joins_pairs
        if pairs.variables and not templated:
            field = pairs.variables_field
            raise InvalidRequest(f"{field}: this model has no chat template for pairs, which it is for", param=field)
        joined = self._templated if templated else self._framed
        if cut.both is not None and cut.both < 0:
            cut = replace(cut, both=self._limits.max_req_input_len)
        encoded, total = [], 0
        for at, ids in enumerate(joined(pairs, cut)):
            field = pairs.second.of(at)
            encoded.append(self._encoder.checked(ids, field, False))
            total += len(ids)
            self._limits.paired(total, field)
        return encoded

    def _framed(self, pairs: TextPairs, cut: PairCut) -> Iterator[list[int]]:
        frame = self._tokenizer.pair_frame
        first = _Once(pairs, lambda text, field: self._ids(text, field, cut, cut.most(cut.first)))
        for some in _in_parts(pairs.second.texts):
            for at, second in zip(some, self._batch(pairs.second, some, cut), strict=True):
                yield frame.join(*cut.apply(first(at), second, frame.size))

    def _templated(self, pairs: TextPairs, cut: PairCut) -> Iterator[list[int]]:
        template = self._tokenizer.chat_template
        assert template is not None
        first = _Once(pairs, lambda text, field: self._shortened(text, field, cut, cut.first))
        for at, text in enumerate(pairs.second.texts):
            field = pairs.second.of(at)
            second = self._shortened(text, field, cut, cut.second)
            with naming(field):
                prompt = template.render_pair(first(at), second, field=field, variables=pairs.variables)
            yield [*cut.kept(self._ids(prompt, field, cut, cut.both), cut.both)]

    def _shortened(self, text: str, field: str, cut: PairCut, most: int | None) -> str:
        """`most` tokens of a text, as text."""
        if most is None:
            return text
        text = self._end(text, cut, most)
        ids = self._ids(text, field, cut, most)
        if len(ids) <= most:
            return text
        spans = self._tokenizer.spans(text, add_special_tokens=False)
        if spans is None or most == 0:
            return self._tokenizer.decode(cut.kept(ids, most), skip_special_tokens=False)
        return text[spans[-most][0] :] if cut.from_left else text[: spans[most - 1][1]]

    def _ids(self, text: str, field: str, cut: PairCut, most: int | None) -> list[int]:
        """Without special tokens; at least `most` of those that are kept of a longer text. None: all."""
        with naming(field):
            if most is None:
                return self._encoder.bounded(text, field, False, False)
            return self._encoder.bounded(self._end(text, cut, most), field, False, True)

    def _end(self, text: str, cut: PairCut, most: int) -> str:
        """What has so many tokens of a long text, and some more, as the last ones depend on what is behind them."""
        longest = self._tokenizer.longest_token
        size = len(text) if longest is None else max(FIRST_LOOK, (most + _SPARE) * longest)
        return text[-size:] if cut.from_left else text[:size]

    def _batch(self, field: FieldOfTexts, some: range, cut: PairCut) -> list[list[int]]:
        texts = field.texts[some.start : some.stop]
        if sum(map(len, texts)) <= FIRST_LOOK:
            try:
                return self._tokenizer.encode_batch(texts, add_special_tokens=False)
            except InvalidRequest:
                pass  # one by one it is told which
        most = cut.most(cut.second)
        return [self._ids(text, field.of(at), cut, most) for at, text in zip(some, texts, strict=True)]


class _Once(Generic[Result]):
    """Work on the first text of a pair that is not done again for the next one where it is the same text."""

    def __init__(self, pairs: TextPairs, work: Callable[[str, str], Result]) -> None:
        """`work`: on a text and its field's name."""
        self._pairs = pairs
        self._work = work
        self._last: tuple[int, Result] | None = None

    def __call__(self, at: int) -> Result:
        first = self._pairs.first_at(at)
        if self._last is None or self._last[0] != first:
            field = self._pairs.first
            self._last = first, self._work(field.texts[first], field.of(first))
        return self._last[1]


def _in_parts(texts: Sequence[str]) -> Iterator[range]:
    """Indices of texts that are tokenised at once: few enough that their tokens take little memory."""
    first, size = 0, 0
    for at, text in enumerate(texts):
        if at > first and size + len(text) > FIRST_LOOK:
            yield range(first, at)
            first, size = at, 0
        size += len(text)
    if texts:
        yield range(first, len(texts))
