"""Log-probabilities of prompts' tokens on a GPU: of the model's own softmax, whatever requests do to it to sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightllmd.engine.runners.transfers import Download
from lightllmd.engine.step import Alternatives, Row, TargetLogprobs
from lightllmd.kernels.linear import Head


class PromptScores:
    """Those of a step's rows that have `targets`, on their way to the host."""

    def __init__(
        self,
        rows: list[Row],
        targets: Tensor | None,
        before: Tensor | None,
        head: Head,
        hidden: Tensor,
        at_once: int,
    ) -> None:
        """`targets` and ``before [N]``: as in `Packed`. ``hidden [T, hidden]`` of all tokens. The logits of `at_once`
        of them exist at a time."""
        self._wanted = [(len(row.targets), row.top_targets) for row in rows if row.targets is not None]
        scores: list[tuple[Tensor, ...]] = []
        if targets is not None and before is not None:
            most = max(top for _, top in self._wanted)
            parts = zip(targets.split(at_once), before.split(at_once), strict=True)
            scores = [_score(head.logits(hidden.index_select(0, at)), ids, most) for ids, at in parts]
        self._download = Download([torch.cat(parts) for parts in zip(*scores, strict=True)], hidden.device)

    def take(self, beat: Callable[[], None]) -> list[TargetLogprobs]:
        """Waits until they are there; calls `beat` now and then."""
        told: list[TargetLogprobs] = []
        logprobs, *best = [tensor.tolist() for tensor in self._download.wait(beat)] or [[]]
        pairs: list[Alternatives] = [list(zip(*both, strict=True)) for both in zip(*best, strict=True)]
        end = 0
        for count, top in self._wanted:
            begin, end = end, end + count
            told.append(TargetLogprobs(logprobs[begin:end], [few[:top] for few in pairs[begin:end]] if top else None))
        return told


def _score(logits: Tensor, targets: Tensor, most: int) -> tuple[Tensor, ...]:
    """Log-probabilities ``[B]`` of ``targets [B]`` and, if `most` is above 0, ids and log-probabilities of the highest
    ``[B, <= most]``. ``logits [B, V]`` are overwritten."""
    totals = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(-1, targets.long()[:, None])[:, 0] - totals[:, 0]
    if not most:
        return (chosen,)
    values, ids = logits.topk(min(most, logits.shape[1]), -1)
    return chosen, ids.int(), values.sub_(totals)
