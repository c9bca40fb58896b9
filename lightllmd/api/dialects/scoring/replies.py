"""How the routes of models that score tell what became of their prompts: each in one piece."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

from lightllmd.api.dialects.openai.choices import usage
from lightllmd.api.dialects.scoring.activation import Activation, identity, of_classifier, sigmoid
from lightllmd.api.dialects.scoring.bodies import (
    ClassifyBody,
    PairsBody,
    PoolingBody,
    RerankBody,
    ScorePairsBody,
    ScoringBody,
)
from lightllmd.api.dialects.vectors import base64_of
from lightllmd.api.inflight.entry import Entry
from lightllmd.api.inflight.pending import Pending
from lightllmd.api.inflight.revision import Revision
from lightllmd.config.plan import Scoring
from lightllmd.errors import InvalidRequest
from lightllmd.requests.faults import shown
from lightllmd.requests.scoring import ScoringJob

Kind = TypeVar("Kind", bound=ScoringBody)
Pairs = TypeVar("Pairs", bound=PairsBody)


@dataclass(frozen=True)
class ScoringReply(ABC, Generic[Kind]):
    """What they share."""

    name: ClassVar[str]

    body: Kind
    scoring: Scoring
    model: str
    created: int
    id: str

    @classmethod
    async def of(cls, revision: Revision, body: Kind, jobs: Sequence[ScoringJob]) -> Self:
        """See `Translation`. Raises InvalidRequest where the model has no such results."""
        scoring = revision.plan.scoring
        assert scoring is not None  # jobs are made for models that score
        cls.check(body, scoring)
        return cls(body, scoring, revision.model_name, int(time.time()), f"{cls.name}-{uuid.uuid4().hex}")

    @classmethod
    def check(cls, body: Kind, scoring: Scoring) -> None:
        """Raises InvalidRequest where the model has no such results."""
        if scoring.marker is not None:
            raise InvalidRequest(f"this model scores the steps of a prompt, which /pooling tells; /{cls.name} can't")

    @abstractmethod
    def whole(self, pending: Pending) -> dict[str, Any]:
        """See `WholeReply`."""

    def _list(self, entries: Sequence[Entry], data: list[dict[str, Any]]) -> dict[str, Any]:
        """As vLLM answers."""
        return {
            "id": self.id,
            "object": "list",
            "created": self.created,
            "model": self.model,
            "data": data,
            "usage": usage(entries, 0),
        }


class PairsReply(ScoringReply[Pairs]):
    """Of two texts each: how well they fit."""

    @classmethod
    def check(cls, body: Pairs, scoring: Scoring) -> None:
        super().check(body, scoring)
        labels = len(scoring.labels)
        if labels != 1:
            raise InvalidRequest(f"/{cls.name} needs a model with one label, and this one has {labels}; see /classify")

    def scores(self, entries: Sequence[Entry]) -> list[float]:
        """They are probabilities if the model's config doesn't say otherwise, as sentence-transformers' cross encoders
        and vLLM tell them. Texts that are the same have the same, whatever the steps that they were in made of the last
        digits."""
        activation = identity if self.body.use_activation is False or self.scoring.raw_pairs else sigmoid
        pairs = self.body.pairs()
        firsts, seconds = pairs.first.texts, pairs.second.texts
        told: dict[tuple[str, str], float] = {}
        return [
            told.setdefault((firsts[pairs.first_at(at)], seconds[at]), activation(entry.values[0])[0])
            for at, entry in enumerate(entries)
        ]


class ScorePairsReply(PairsReply[ScorePairsBody]):
    """Of /score."""

    name = "score"

    def whole(self, pending: Pending) -> dict[str, Any]:
        """See `WholeReply`."""
        scores = enumerate(self.scores(pending.entries))
        data = [{"index": index, "object": "score", "score": score} for index, score in scores]
        return self._list(pending.entries, data)


class RerankReply(PairsReply[RerankBody]):
    """Of /rerank: vLLM's and Jina's fields, and in `meta` Cohere's."""

    name = "rerank"

    def whole(self, pending: Pending) -> dict[str, Any]:
        """See `WholeReply`. Documents with the same score stay in their order."""
        body = self.body
        ranked = sorted(enumerate(self.scores(pending.entries)), key=lambda scored: (-scored[1], scored[0]))
        results = []
        for index, score in ranked[: body.top_n] if body.top_n > 0 else ranked:
            result: dict[str, Any] = {"index": index, "relevance_score": score}
            if body.return_documents:
                result["document"] = body.document(index)
            results.append(result)
        used = usage(pending.entries, 0)
        meta = {"tokens": {"input_tokens": used["prompt_tokens"], "output_tokens": 0}}
        return {"id": self.id, "model": self.model, "results": results, "usage": used, "meta": meta}


class ClassifyReply(ScoringReply[ClassifyBody]):
    """Of /classify."""

    name = "classify"

    def whole(self, pending: Pending) -> dict[str, Any]:
        """See `WholeReply`. Of labels with the same probability the first one is told."""
        labels = self.scoring.labels
        activation = _activation(self.scoring, self.body.use_activation is not False)
        data = []
        for index, entry in enumerate(pending.entries):
            probs = activation(entry.values[0])
            label = labels[max(range(len(probs)), key=probs.__getitem__)]
            data.append({"index": index, "label": label, "probs": probs, "num_classes": len(probs)})
        return self._list(pending.entries, data)


class PoolingReply(ScoringReply[PoolingBody]):
    """Of /pooling: the logits themselves, if no activation was asked for."""

    name = "pooling"

    @classmethod
    def check(cls, body: PoolingBody, scoring: Scoring) -> None:
        task = "classify" if scoring.marker is None else "token_classify"
        if body.task not in (None, task):
            raise InvalidRequest(f"task: this model has {task}; got {shown(body.task)}", param="task")

    def whole(self, pending: Pending) -> dict[str, Any]:
        """See `WholeReply`."""
        data = [
            {"index": index, "object": "pooling", "data": self._pooled(entry)}
            for index, entry in enumerate(pending.entries)
        ]
        return self._list(pending.entries, data)

    def _pooled(self, entry: Entry) -> list[float] | list[list[float]] | str:
        body, values = self.body, entry.values
        if body.use_activation:
            activation = _activation(self.scoring, True)
            values = [activation(vector) for vector in values]
        if body.encoding_format == "base64":
            return base64_of(values, body.embed_dtype, body.endianness)
        return values if self.scoring.marker is not None else values[0]


def _activation(scoring: Scoring, active: bool) -> Activation:
    return of_classifier(scoring.problem_type, len(scoring.labels)) if active else identity
