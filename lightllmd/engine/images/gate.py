"""Where requests wait until the embeddings of all their images are here. They hold no slot and no place in the line
meanwhile: others pass them, and they come to the place that their arrival gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lightllmd.config.plan import Plan
from lightllmd.engine.grammar_gate import Refused, Waiting
from lightllmd.engine.images.client import EmbeddingClient
from lightllmd.engine.images.prompt_images import ImageEmbedding, PromptImages, fault_of, positions_in_grids
from lightllmd.engine.scheduling.sequence import Owner
from lightllmd.ipc.messages import Submit


class WithImages(NamedTuple):
    """A request, and its images with their embeddings."""

    waiting: Waiting
    images: PromptImages


class _Held(NamedTuple):
    waiting: Waiting
    found: dict[bytes, ImageEmbedding]  # by key; what is here stays here while the others are awaited
    missing: set[bytes]


class ImageGate:
    """All calls come from the engine's loop."""

    def __init__(self, plan: Plan, client: EmbeddingClient | None) -> None:
        """`client` None: this engine takes no images."""
        self._client, self._vocab = client, plan.vocab_size
        self._whole, self._grids = plan.sees_both_ways, plan.sees_in_grids
        http = plan.config.http
        self._queue_timeout, self._hold_timeout = http.queue_timeout, http.hold_timeout
        self._held: dict[int, _Held] = {}  # by request

    def __len__(self) -> int:
        """Sequences that wait."""
        return sum(len(held.waiting.message.branches) for held in self._held.values())

    @property
    def due(self) -> float:
        """When `take` has something to do though nothing was said; inf: never."""
        return float("inf") if self._client is None else self._client.due

    def open(self, one: Waiting, now: float) -> WithImages | Refused | None:
        """None: it waits here, and comes by `take`. `now`: monotonic seconds."""
        message = one.message
        if self._client is None:
            return Refused(message, "this engine takes no images")
        if fault := fault_of(message.images, len(message.prompt_ids)):
            return Refused(message, fault)
        held = _Held(one, {}, set())
        for span in message.images:
            embedding = self._client.find(span.key, now)
            if embedding is None:
                held.missing.add(span.key)
            else:
                held.found[span.key] = embedding
        if not held.missing:
            return self._seen(held)
        self._held[message.request] = held
        return None

    def take(self, now: float) -> list[WithImages | Refused]:
        """Requests that need not wait any more, in the order of their coming."""
        if self._client is None:
            return []
        come = self._client.handle(now)
        if not come:
            return []
        taken: list[WithImages | Refused] = []
        for request, held in list(self._held.items()):
            why = ""
            for key in held.missing & come.keys():
                embedding = come[key]
                if isinstance(embedding, str):
                    why = embedding
                    break
                held.missing.discard(key)
                held.found[key] = embedding
            if why or not held.missing:
                del self._held[request]
                taken.append(Refused(held.waiting.message, why) if why else self._seen(held))
        if any(isinstance(one, Refused) for one in taken):
            self._keep(lambda _: True)  # what none waits for any more is not asked for
        return taken

    def _seen(self, held: _Held) -> WithImages | Refused:
        message = held.waiting.message
        ids, spans = message.prompt_ids, message.images
        embeddings = [held.found[span.key] for span in spans]
        for span, embedding in zip(spans, embeddings, strict=True):
            if embedding.tokens != span.tokens:
                return Refused(message, f"an image of {embedding.tokens} tokens has {span.tokens} in the prompt")
            inside = slice(span.start, span.start + span.tokens)
            if not 0 <= ids[span.start] < self._vocab:  # a placeholder that the model has no row for
                ids[inside] = [0] * span.tokens
        positions = None
        if self._grids:
            if any(span.grid[0] * span.grid[1] * span.grid[2] != span.tokens for span in spans):
                return Refused(message, "an image's grid has other places than its tokens")
            positions = positions_in_grids(spans, len(ids))
        return WithImages(held.waiting, PromptImages(spans, embeddings, whole=self._whole, positions=positions))

    def expire(self, now: float) -> list[tuple[Submit, str]]:
        """Requests that have waited for too long, and why they wait: `queue_timeout`, where there is one, those that no
        engine had, `hold_timeout` all."""
        late = []
        for held in self._held.values():
            message, waited = held.waiting.message, now - held.waiting.since
            if waited >= self._hold_timeout or (not message.replay and 0 < self._queue_timeout <= waited):
                why = f"the request waited {waited:.0f} s for {len(held.missing)} of its images to be encoded"
                late.append((message, why))
        for message, _ in late:
            self.abort(message.request)
        return late

    def abort(self, request: int, branches: list[int] | None = None) -> None:
        """As `Scheduler.abort`, of one that waits here."""
        held = self._held.get(request)
        if held is None:
            return
        message = held.waiting.message
        gone = message.branches if branches is None else branches
        left = [at for at, branch in enumerate(message.branches) if branch not in gone]
        message.emitted = [message.emitted[at] for at in left]
        message.branches = [message.branches[at] for at in left]
        self._keep(lambda message: bool(message.branches))

    def api_gone(self, owner: Owner) -> None:
        """As `Scheduler.api_gone`."""
        self._keep(lambda message: (message.api, message.epoch) != owner)

    def clear(self) -> None:
        """None waits any more."""
        self._keep(lambda _: False)

    def holds(self, request: int) -> bool:
        """It waits here."""
        return request in self._held

    def _keep(self, wanted: Callable[[Submit], bool]) -> None:
        self._held = {request: held for request, held in self._held.items() if wanted(held.waiting.message)}
        missing = set[bytes]().union(*(held.missing for held in self._held.values()))
        if self._client is not None:
            self._client.keep(missing)
