"""One step in the making: rows of sequences that are fed, or wait for no more than their own newest token."""

from __future__ import annotations

from bisect import bisect_left

from lightllmd.engine.kv_cache.manager import KvCacheManager
from lightllmd.engine.scheduling.sequence import Sequence
from lightllmd.engine.step import DecodeRows, Kind, Masks, PoolingRow, Row, SamplingRow, Step
from lightllmd.ipc.messages import PoolingParams, SamplingParams


class Composer:
    """Collects the rows of one step, then makes the `Step`."""

    def __init__(self, number: int, keys: KvCacheManager) -> None:
        self.number = number
        self.named: list[Sequence] = []  # whose tokens the rows make, in their order
        self.targets: list[tuple[Sequence, int]] = []  # whose prompt is told of, from which of its tokens on
        self.pooled: list[tuple[Sequence, bool]] = []  # whose hidden states become vectors; whether it ends with it
        self.fed = 0  # tokens of prompts
        self.prompts = 0  # their rows
        self._keys = keys
        self.rows: list[Row] = []
        self.late: list[
            tuple[int, Sequence]
        ] = []  # table rows, and whose they are, whose masks need tokens that are out
        self._masks: Masks = {}

    def feed(self, sequence: Sequence, most: int) -> None:
        """The next part of a prompt, of at most `most` tokens, if it need not wait for another one's."""
        if not sequence.entered and not self._keys.find_more(sequence, self.number):
            return
        if self._keys.cache and sequence.first and not sequence.entered and not sequence.emitted:
            sequence.cached = sequence.shared
        first, end = sequence.fed, min(sequence.target, sequence.fed + most)
        images = sequence.images
        if images is not None:
            end = images.end_of_part(first, end)
            if end - first > most and self.fed:
                return  # an image that is fed whole comes first in a step of its own, if it is larger than what is left
        prompt, emitted = sequence.prompt_ids, sequence.emitted
        tokens = prompt[first:end] + emitted[max(0, first - len(prompt)) : max(0, end - len(prompt))]
        targets = None
        if sequence.first and sequence.params.prompt_logprobs >= 0 and not emitted:
            targets = prompt[first + 1 : end + 1]
            self.targets.append((sequence, first + 1))
        entering = sequence.stale or not sequence.entered
        row = self._row(sequence, first, tokens)
        row.slots = sequence.slots[first:end]
        if images is not None:
            row.images, row.positions = images.parts(first, end), images.positions(first, end)
            if images.whole and row.images:
                row.bidirectional = [(part.first, part.rows) for part in row.images]
        row.sample = end == sequence.target and sequence.generates
        if not sequence.generates:
            row.pooling = self._pooling(sequence, first, end, entering)
        row.targets, row.top_targets = targets, max(0, sequence.params.prompt_logprobs) if targets is not None else 0
        sequence.fed = end
        self.fed += end - first
        self.prompts += 1
        self._keys.publish(sequence, self.number)
        at = len(self.rows) - 1
        if not row.sample:
            return
        self.named.append(sequence)
        if sequence.fork is None or sequence.beam:
            return
        for follower in sequence.fork.members[1:]:
            if follower.prefilling:
                self._keys.follow(follower, sequence)
                self._row(follower, follower.fed, []).sibling_of = at
                self.named.append(follower)

    def _pooling(self, sequence: Sequence, first: int, end: int, entering: bool) -> PoolingRow:
        """Of the tokens `first` to `end`. A place before them has its vector from a step before this one."""
        places, before = sequence.places, sequence.pooled_places
        sequence.pooled_places = bisect_left(places, end, before)
        self.pooled.append((sequence, end == sequence.target))
        at = [place - first for place in places[before : sequence.pooled_places]]
        summed = isinstance(sequence.params, PoolingParams) and sequence.params.mean
        return PoolingRow(at, sequence.prompt_ids if entering else None, summed)

    def choose(self, sequence: Sequence) -> None:
        """A beam's newest token, which goes to the last of its slots."""
        at = len(sequence.slots) - 1
        row = self._row(sequence, at, [sequence.emitted[-1]])
        row.slots = [sequence.slots[at]]
        self.named.append(sequence)

    def _row(self, sequence: Sequence, start: int, tokens: list[int]) -> Row:
        entering = sequence.stale or not sequence.entered
        sequence.entered, sequence.stale = True, False
        sampling = None
        if entering and isinstance(sequence.params, SamplingParams):
            sampling = SamplingRow(sequence.params, sequence.prompt_ids, list(sequence.emitted))
        row = Row(
            table_row=sequence.table_row,
            request=sequence.request,
            branch=sequence.branch,
            start=start,
            tokens=tokens,
            slots=[],
            sample=True,
            position=len(sequence.emitted),
            sampling=sampling,
            prompt_length=len(sequence.prompt_ids),
            past=sequence.slots[:start] if entering and start else None,
            shift=sequence.shift,
        )
        self.rows.append(row)
        if entering:
            sequence.masked = False
        if sequence.restricted:
            mask = sequence.next_mask()
            if mask or not entering:
                self._masks[sequence.table_row] = mask
        return row

    def step(self, going_on: list[Sequence], freed: list[int]) -> Step:
        """`going_on` feed their newest tokens, which go to the last of their slots."""
        self.late = [(sequence.table_row, sequence) for sequence in going_on if sequence.restricted]
        decode = DecodeRows(
            table_rows=[sequence.table_row for sequence in going_on],
            starts=[len(sequence.slots) - 1 for sequence in going_on],
            slots=[sequence.slots[-1] for sequence in going_on],
            positions=[len(sequence.emitted) + sequence.pending for sequence in going_on],
        )
        followers = sum(row.sibling_of is not None for row in self.rows)
        alone = not going_on and self.prompts + followers == len(self.rows)
        kind: Kind = "decode" if not self.prompts else "prefill" if alone else "mixed"
        return Step(self.number, kind, decode, self.rows, freed, self._masks)
