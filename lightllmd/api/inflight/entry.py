"""One request in flight."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

from lightllmd.api.inflight.groups import EngineGroup
from lightllmd.errors import RequestError
from lightllmd.ipc.messages import ImageSpan, RequestParams
from lightllmd.requests.branch import Branch
from lightllmd.requests.prompt_log import PromptLog
from lightllmd.requests.seeing import SeenImages
from lightllmd.requests.urgency import Turn


class Owner(Protocol):
    """The ledger that an entry is in."""

    def cancel(self, entry: Entry) -> None:
        """The client is gone. Nothing happens to an entry that has ended."""

    def lose_images(self, entry: Entry, error: RequestError) -> None:
        """No engine will have them that has not had them yet."""


class Entry:
    """Changed by its ledger only; read by the response that shows it."""

    __slots__ = (
        "arrival_ns",
        "arrived_at",
        "batch",
        "branches",
        "cached",
        "deadline",
        "ended_at",
        "error",
        "first_token_at",
        "group",
        "held_since",
        "images",
        "ledger",
        "notify",
        "outcome",
        "params",
        "private",
        "prompt_ids",
        "prompt_log",
        "prompt_tokens",
        "proven",
        "queued",
        "refused_by",
        "request",
        "seen",
        "started_at",
        "strikes",
        "submitted",
        "suspect",
        "suspect_at",
        "suspect_since",
        "turn",
        "unseen",
        "vectors",
    )

    def __init__(
        self,
        ledger: Owner,
        request: int,
        prompt_ids: list[int],
        params: RequestParams,
        branches: list[Branch],
        notify: Callable[[], None],
        arrived_at: float,
        now: float,
        private: bool,
        prompt_tokens: int,
        turn: Turn,
        images: Sequence[ImageSpan] = (),
        seen: SeenImages | None = None,
    ) -> None:
        self.ledger = ledger  # whose it is now; another one's after it migrated
        self.request = request
        self.batch = request  # the request that the first prompt of the same body became
        self.turn = turn
        self.deadline = turn.urgency.deadline(arrived_at)  # seconds of the ledger's clock; None: none
        self.arrival_ns = time.monotonic_ns()
        self.prompt_ids = prompt_ids
        self.prompt_tokens = prompt_tokens  # of the prompt that was given: more than are run where some were taken back
        self.images = images  # in the prompt
        self.seen = seen  # the same, kept where they were seen until it has ended
        self.unseen: RequestError | None = None  # why no other engine will have its images
        self.prompt_log = PromptLog()
        self.cached = 0  # prompt tokens that the engine that gave the first token found in its prompt cache
        self.params = params
        self.branches = branches  # none where nothing is generated
        self.vectors: list[bytes] = []  # the result of such a request, once it has ended: see `Pooled`
        self.notify = notify
        self.error: RequestError | None = None
        self.outcome: str | None = None  # "ok" | "cancelled" | "failed"; None while in flight
        self.group: EngineGroup | None = None  # where it is; None: it is held
        self.queued = 0  # of its tokens, those to be computed there before the next one
        self.refused_by: dict[int, float] = {}  # generations whose queue was full -> seconds to wait
        self.submitted = False  # to any generation
        self.proven = False  # has a token of the generation that it was last submitted to
        self.suspect = 0  # deaths of engines since its last token that it may have caused
        self.suspect_since = 0.0  # seconds of the ledger's clock: the first of them
        self.suspect_at: int | None = None  # the replica that died, whose next generation it waits for
        self.strikes = 0  # those that tell most likely of it
        self.held_since: float | None = None
        self.arrived_at = arrived_at  # seconds of the ledger's clock: when its HTTP request came
        self.started_at = now
        self.first_token_at: float | None = None
        self.ended_at: float | None = None
        self.private = private  # this worker's own and no client's: in no total, never held

    @property
    def generated(self) -> int:
        """Tokens of all branches."""
        return sum(len(branch.ids) for branch in self.branches)

    @property
    def values(self) -> list[list[float]]:
        """The numbers of `vectors`."""
        return [array("f", vector).tolist() for vector in self.vectors]

    @property
    def answer_size(self) -> int:
        """Numbers and texts in its answer, about."""
        pooled = sum(map(len, self.vectors)) // 4
        return self.prompt_log.size + self.generated * (1 + self.params.top_logprobs) + pooled
