"""A sequence: one branch of a request, as the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from lightllmd.engine.images.prompt_images import PromptImages
from lightllmd.engine.kv_cache.radix_tree import Node
from lightllmd.engine.scheduling.beam_search import BeamSearch, HypothesisText
from lightllmd.engine.scheduling.restriction import Restriction
from lightllmd.ipc.messages import PoolingParams, RequestParams, SamplingParams, Submit

Owner = tuple[int, int]  # (api worker, its epoch)
SELF: Owner = (-1, 0)  # the owner of the engine's own requests, which have the number 0
TokenIds = NDArray[np.int32]


class State(Enum):
    """Where a sequence is in its life, and what it holds."""

    WAITING = "waiting"  # never admitted by this generation, and without a token
    PAUSED = "paused"  # admitted before (by this generation or one that died); holds no slot and no row
    RUNNING = "running"  # owns a table row and slots
    ENDING = "ending"  # the step that makes its last token is out; holds nothing
    ENDED = "ended"  # finished or aborted; holds nothing


@dataclass(slots=True, eq=False)
class Submission:
    """The requests that came in one body."""

    room: bool  # there was some for them
    started: bool = False  # one of them was admitted


@dataclass(slots=True, eq=False)
class Fork:
    """Sequences of one request that run on the same prompt, which the first of them feeds.

    The slots of the prompt are charged to `members[0]`, see `Sequence.common`. Beams are a fork for as long as they are
    here; branches that draw for themselves join one when they are admitted with the first.
    """

    members: list[Sequence] = field(default_factory=list)
    search: BeamSearch | None = None  # None: each draws for itself
    ends: frozenset[int] = frozenset()  # of a search: the tokens that end a hypothesis
    reading: HypothesisText | None = None  # of a search: what it begins with, where stops end a hypothesis too

    def leave(self, sequence: Sequence) -> None:
        """It gave its slots back: the next one pays for the prompt."""
        first = self.members[0] is sequence
        self.members.remove(sequence)
        sequence.fork = None
        if first and self.members:
            self.members[0].common = self.members[0].shared


@dataclass(slots=True, eq=False)
class Sequence:
    """Set by the scheduler and its `KvCacheManager` alone.

    Invariant while running, once its prompt is fed: ``len(slots)`` tokens are in the cache as soon as the steps that
    are out have run. That is all of the prompt, the emitted and the pending ones but the newest.
    """

    request: int
    branch: int
    owner: Owner
    # (turn, request, branch), less is sooner. Its turn is its arrival, in nanoseconds on the api workers' monotonic
    # clock, and so much later as its priority says.
    order: tuple[int, int, int]
    arrival_ns: int
    prompt_ids: list[int]
    params: RequestParams
    emitted: list[int]
    state: State
    first: bool = True  # of the branches that its request came with
    suspect: int = 0  # see Submit; 0 again with its next token
    replayed: bool = False
    tenant: int = 0
    weight: float = 1.0  # of the tenant
    priority: int = 0  # see Submit
    submission: Submission | None = None
    since: float = 0.0  # when it came, on the clock of `Scheduler.submit`
    charged: int = 0  # of its tokens, told to `FairQueue.charge`
    pending: int = 0  # tokens that steps which are out will make
    table_row: int = -1
    # --- its keys and values
    slots: list[int] = field(default_factory=list)  # of its tokens, in order; while running
    node: Node | None = None  # of the prompt cache's tree, locked: where the slots end that belong to the tree
    shared: int = 0  # how many those are
    common: int = 0  # tokens whose slots are not charged to this sequence: the tree's, or the fork's
    fed: int = 0  # of `target`: whose keys and values are in the cache, or the steps so far compute
    target: int = 0  # tokens that its (re)admission feeds or finds, before the next one is drawn
    entered: bool = False  # the runner knows it under `table_row`
    stale: bool = False  # what the runner knows is no longer so: its next row enters anew
    # --- how its tokens are chosen
    forks: bool = False  # the branches of its request share its prompt
    fork: Fork | None = None
    restriction: Restriction | None = None
    masked: bool = False  # the runner has a mask of it that stays what it is
    cached: int = 0  # prompt tokens found in the prompt cache, until the api worker is told
    images: PromptImages | None = None  # of its prompt, until it ends
    prompt_key: TokenIds | None = None  # of the prompt, see `key`; set where it has images
    # --- what is made of its hidden states, where its params are PoolingParams
    pooled_places: int = 0  # of `places`, from the first: those that steps make vectors at, or made
    vectors: list[bytes] = field(default_factory=list)  # that are here; a pause does not undo them
    total: NDArray[np.float64] | None = None  # of a mean: the sum of what steps have told, which is no vector yet

    @property
    def length(self) -> int:
        """Tokens that a (re)admission feeds; nothing is pending then."""
        return len(self.prompt_ids) + len(self.emitted)

    @property
    def generates(self) -> bool:
        """It goes on behind its prompt; else it ends with that."""
        return self.params.max_new_tokens > 0

    @property
    def sampling(self) -> SamplingParams:
        """Its params, where it generates."""
        assert isinstance(self.params, SamplingParams)
        return self.params

    @property
    def places(self) -> list[int] | range:
        """The tokens whose hidden states become vectors, by index, ascending; none where it generates."""
        params = self.params
        if not isinstance(params, PoolingParams):
            return []
        if params.mean:
            return range(len(self.prompt_ids))
        return [len(self.prompt_ids) - 1] if params.at is None else params.at

    def take_vectors(self, vectors: list[bytes]) -> None:
        """Those of a part of its prompt."""
        if not (isinstance(self.params, PoolingParams) and self.params.mean):
            self.vectors += vectors
            return
        for vector in vectors:
            part = np.frombuffer(vector, "<f4").astype(np.float64)
            self.total = part if self.total is None else self.total + part

    @property
    def needless(self) -> int:
        """Tokens from the first on whose hidden states are not needed, so that their keys and values may come from the
        prompt cache: all before the last, or before the next of its places."""
        needed, places = self.length - 1, self.places
        if self.pooled_places < len(places):
            needed = min(needed, places[self.pooled_places])
        return needed if self.images is None else self.images.uncut(needed)

    @property
    def shift(self) -> int:
        """See `Row.shift`."""
        return 0 if self.images is None else self.images.shift

    @property
    def key(self) -> TokenIds:
        """The tokens that are known, as the prompt cache compares them: ids, or the numbers of `ImageNumbers`."""
        if self.prompt_key is None:
            self.prompt_key = np.array(self.prompt_ids, np.int32)
        return np.concatenate([self.prompt_key, np.array(self.emitted, np.int32)]) if self.emitted else self.prompt_key

    @property
    def computed(self) -> int:
        """Tokens that are in the cache as soon as the steps that are out have run."""
        return self.fed if self.prefilling else len(self.slots)

    @property
    def fork_lead(self) -> Sequence | None:
        """Of its fork, the one that feeds the prompt, or fed it."""
        return self.fork.members[0] if self.fork is not None else None

    @property
    def beam(self) -> bool:
        """The scheduler chooses its tokens."""
        return self.fork is not None and self.fork.search is not None

    @property
    def prefilling(self) -> bool:
        """It runs, and has no next token yet. A follower waits for its leader."""
        return self.fed < self.target

    @property
    def feeds(self) -> bool:
        """It has a part of its prompt to feed; who follows another one in a fork has none."""
        return self.fed < self.target and self.fork_lead in (None, self)

    @property
    def restricted(self) -> bool:
        """Its next token needs a mask that the runner does not have."""
        return self.restriction is not None and not self.masked

    def next_mask(self) -> bytes:
        """That mask; all tokens before are here."""
        assert self.restriction is not None
        self.masked = self.restriction.settled(self.emitted)
        return self.restriction.mask(self.emitted)

    def estimate(self, worst_case: bool, new_token_len: int) -> tuple[int, int]:
        """(tokens held after its next step, tokens still to come after that), as the admission rule counts them;
        pending ones count as emitted.

        The sum is the most slots that it will ever hold, when `worst_case` or ignore_eos; else an optimistic guess
        of the output's length takes the place of max_new_tokens.
        """
        # All beams go on from what the first makes, those without a past too.
        pending = self.fork.members[0].pending if self.fork is not None and self.beam else self.pending
        emitted, most = len(self.emitted) + pending, self.params.max_new_tokens
        if not (worst_case or self.params.ignore_eos):
            most = min(most, max(int(1.1 * emitted), new_token_len))
        next_ = self.generates and self.state is not State.RUNNING
        return len(self.prompt_ids) + emitted + next_, max(0, most - emitted - 1 - next_)


def sequences_of(submit: Submit, ageing: float = 0.0) -> list[Sequence]:
    """The branches of a request that enters. One that ran on an engine before enters paused. `ageing`: seconds of
    waiting that a step of priority is worth, so that whatever waits long enough becomes the first."""
    turn = submit.arrival_ns + round(submit.priority * ageing * 1e9)
    ran = submit.replay and (submit.suspect > 0 or any(submit.emitted))
    return [
        Sequence(
            request=submit.request,
            branch=branch,
            owner=(submit.api, submit.epoch),
            order=(turn, submit.request, branch),
            arrival_ns=submit.arrival_ns,
            prompt_ids=submit.prompt_ids,
            params=submit.params,
            emitted=list(emitted),
            state=State.PAUSED if ran else State.WAITING,
            first=index == 0,
            suspect=submit.suspect,
            replayed=submit.replay,
            tenant=submit.tenant,
            weight=submit.weight,
            priority=submit.priority if ageing else 0,
            charged=len(emitted),
        )
        for index, (branch, emitted) in enumerate(zip(submit.branches, submit.emitted, strict=True))
    ]
