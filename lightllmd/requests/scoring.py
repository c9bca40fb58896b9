"""What is asked of whole prompts: vectors instead of text, scores of a model that scores, embeddings of any other. A
dialect uses it so::

    Translation(
        body=ScoreBody,
        asked=lambda body: ScoresAsked(
            TextPairs(FieldOfTexts("query", [body.query], listed=False), FieldOfTexts("documents", body.documents)),
            prompts_field="documents",
            model=body.model,
        ),
        reply=ScoreReply.of,  # async (revision, body, jobs) -> Reply; jobs are the `ScoringJob`s, one a prompt
        streamed=lambda body: False,
        error_frame=error_frame,
    )

and hands that to `Responder.respond`, as routes that generate do. `Reply.whole(pending)` then reads
``pending.entries``, one for each prompt, in their order:

* ``entry.values``: ``list[list[float]]``, raw logits in fp32: one vector for each place that is scored, which is the
  prompt's last token, or each token `Scoring.marker` of a process-reward model; a value for each label.
  ``entry.vectors`` are the same as bytes (fp32, little-endian), for answers in base64;
* ``entry.prompt_tokens``, ``entry.cached``: tokens of the prompt, and those of them found in the prompt cache.

``revision.plan.scoring`` (`config.plan.Scoring`) has the labels' names in the order of a vector's values, and the
problem type of the model's config; it is None where the model doesn't score, and then the `Intake` refuses what is
asked with InvalidRequest (400), as it refuses `Asked` of a reward model. With `embeds` what is asked for are
embeddings, as ``revision.plan.embedding`` says: then ``entry.vectors`` are one, ready to be told.

Tests run it on the fake engine: ``use_reward_model = true``, ``engine.backend = "fake"``; its scores are
`engine.runners.fake_model.fake_score`'s, of so many labels as ``engine.fake.score_labels`` says, at the last token or
at each ``engine.fake.score_marker``. In process it is ``stack(folder, plan=make_plan(scoring=Scoring(…)))`` of
``tests/api/frontend_harness.py``.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightllmd.config.plan import Plan, Scoring
from lightllmd.errors import InvalidRequest
from lightllmd.ipc.messages import ImageSpan, PoolingParams
from lightllmd.requests.asked import Chat, TextPairs
from lightllmd.requests.branch import Branch
from lightllmd.requests.faults import naming
from lightllmd.requests.limits import RequestLimits
from lightllmd.requests.seeing import EncodedPrompt, Holding, ImageIntake, SeenImages
from lightllmd.requests.text_work import JOB_COST, TextWork
from lightllmd.text.interface import Tokenizer
from lightllmd.text.pairs import NO_CUT, PairCut


@dataclass(frozen=True)
class ScoredPrompt:
    """One prompt, and the dialect's name of the field that has it."""

    content: str | list[int] | array[int] | Chat
    field: str


@dataclass(frozen=True)
class ScoresAsked:
    """One body."""

    prompts: Sequence[ScoredPrompt] | TextPairs
    prompts_field: str  # all prompts of the body, whose number is bounded
    model: str | None = None  # that shall answer; None: whichever is served
    add_special_tokens: bool = True  # around texts that are no pairs
    keep_first: int | None = None  # of a longer prompt the first so many tokens are run; -1: as many as fit
    keep_last: int | None = None  # the same of the last. Both are for prompts that are no pairs
    pair_cut: PairCut = NO_CUT  # what is kept of pairs
    use_cache: bool = True  # of prompts
    embeds: bool = False  # embeddings are asked for, no scores
    dimensions: int | None = None  # of an embedding its first so many values are told, with the length 1 again
    unit: bool | None = None  # each embedding gets the length 1; None: as the model's own settings say


@dataclass(frozen=True)
class ScoringJob:
    """One prompt, checked and ready to run."""

    given_ids: list[int]  # the prompt
    cut: bool  # because it was too long
    prompt_ids: list[int]  # what is run of it
    params: PoolingParams
    images: Sequence[ImageSpan] = ()
    seen: SeenImages | None = None

    def branches(self, tokenizer: Tokenizer | None) -> list[Branch]:
        """None: nothing is generated."""
        return []


class ScoringIntake:
    """From what is asked to jobs: every rule that needs the plan, once for all dialects."""

    def __init__(self, plan: Plan, limits: RequestLimits, work: TextWork, images: ImageIntake) -> None:
        self._scoring, self._embedding, self._generates = plan.scoring, plan.embedding, plan.generates
        self._limits, self._work, self._images = limits, work, images
        # Tokens that a prompt which ends with one has at its end, too, where it is cut.
        ending = None if plan.scoring is None else plan.scoring.ending
        self._endings = frozenset(plan.eos_id if plan.scoring is None else [] if ending is None else [ending])

    def refuse_generation(self) -> None:
        """Raises InvalidRequest where the model is one that only scores, or embeds."""
        if self._scoring is None and not self._generates:
            raise InvalidRequest(
                "this server's model has no language model head and generates no text; it answers /v1/embeddings",
                code="embedding_model",
            )
        if self._scoring is not None:
            raise InvalidRequest(
                "this server has a reward model (use_reward_model = true), which generates no text; it answers "
                "/get_score, /score, /rerank, /classify and /pooling",
                code="reward_model",
            )

    async def jobs(self, asked: ScoresAsked) -> list[ScoringJob]:
        """One for each prompt. Raises InvalidRequest, which names the dialect's own field, its value and the bound."""
        scoring = self._scoring
        if asked.embeds:
            self._check_embedding(asked)
        elif scoring is None:
            raise InvalidRequest(
                "this server's model gives no scores; those need a reward model (use_reward_model = true)",
                code="no_reward_model",
            )
        self._limits.at_once(len(asked.prompts), asked.prompts_field)
        with naming(asked.prompts_field), Holding() as holding:
            given = await self._given(asked, scoring, holding)
            size = sum(len(one.ids) for one in given) // 4 + len(given) * JOB_COST
            return await self._work.compute(size, self._checked, asked, scoring, given)

    def _check_embedding(self, asked: ScoresAsked) -> None:
        embedding, dimensions = self._embedding, asked.dimensions
        if embedding is None:
            raise InvalidRequest(
                "this server has a reward model (use_reward_model = true), which gives no embeddings; it answers "
                "/get_score, /score, /rerank, /classify and /pooling",
                code="reward_model",
            )
        if dimensions is not None and dimensions > embedding.size:
            raise InvalidRequest(
                f"dimensions: should be at most {embedding.size}, the values that this model's embeddings have; "
                f"got {dimensions}",
                param="dimensions",
            )

    async def _given(self, asked: ScoresAsked, scoring: Scoring | None, holding: Holding) -> Sequence[EncodedPrompt]:
        """Each prompt."""
        if isinstance(asked.prompts, TextPairs):
            return [EncodedPrompt(ids) for ids in await self._work.encode_pairs(asked.prompts, asked.pair_cut)]
        cut = asked.keep_first is not None or asked.keep_last is not None
        texts = [prompt for prompt in asked.prompts if isinstance(prompt.content, str)]
        encoded: Iterator[list[int]] = iter(())
        if texts:
            encoded = iter(
                await self._work.encode(
                    [str(prompt.content) for prompt in texts],
                    [prompt.field for prompt in texts],
                    add_special_tokens=asked.add_special_tokens,
                    cut=cut,
                )
            )
        given: list[EncodedPrompt] = []
        for prompt in asked.prompts:
            content = prompt.content
            if isinstance(content, str):
                given.append(EncodedPrompt(next(encoded)))
            elif isinstance(content, Chat) and content.images:
                seen = await self._images.given(content, content.images, prompt.field, holding, cut=cut)
                given.append(seen._replace(ids=_ended([*seen.ids], scoring)))
            elif isinstance(content, Chat):
                given.append(
                    EncodedPrompt(_ended(await self._work.encode_chat(content, prompt.field, cut=cut), scoring))
                )
            else:
                given.append(EncodedPrompt(content))
        return given

    def _checked(self, asked: ScoresAsked, scoring: Scoring | None, given: Sequence[EncodedPrompt]) -> list[ScoringJob]:
        prompts = asked.prompts
        fields = (
            map(prompts.second.of, range(len(prompts)))
            if isinstance(prompts, TextPairs)
            else (prompt.field for prompt in prompts)
        )
        jobs = [self._job(asked, scoring, field, one) for field, one in zip(fields, given, strict=True)]
        places = sum(1 if job.params.at is None else len(job.params.at) for job in jobs)
        if scoring is not None:
            self._limits.vectors(places, len(scoring.labels), asked.prompts_field)
        elif self._embedding is not None:
            self._limits.vectors(places, asked.dimensions or self._embedding.size, asked.prompts_field)
        return jobs

    def _job(self, asked: ScoresAsked, scoring: Scoring | None, field: str, given: EncodedPrompt) -> ScoringJob:
        length, last = len(given.ids), given.ids[-1:]
        given = self._kept(asked, given, field)
        if given.ids[-1:] != last and last[0] in self._endings and given.behind_images:
            given = given._replace(ids=[*given.ids[:-1], last[0]])  # where the model is read stays the end
        given = given.without(*self._limits.cut(len(given.ids), field), field)
        ids = [*given.ids]
        self._limits.token_ids(ids, field)
        params = self._embedded(asked) if scoring is None else self._scored(asked, scoring, field, ids)
        return ScoringJob(ids, len(ids) != length, ids, params, given.images, given.seen)

    def _scored(self, asked: ScoresAsked, scoring: Scoring, field: str, ids: list[int]) -> PoolingParams:
        if scoring.marker is None:
            return PoolingParams(use_cache=asked.use_cache)
        at = [index for index, token in enumerate(ids) if token == scoring.marker]
        if not at:
            raise InvalidRequest(
                f"{field}: this model scores a prompt at each token {scoring.marker}, of which it has none",
                param=field,
            )
        return PoolingParams(at, asked.use_cache)

    def _embedded(self, asked: ScoresAsked) -> PoolingParams:
        """A shortened vector gets its length back, as Matryoshka embeddings are used (Kusupati et al. 2022)."""
        embedding = self._embedding
        assert embedding is not None  # or it was refused
        pooling, size = embedding.pooling, asked.dimensions or 0
        return PoolingParams(
            [0] if pooling.kind == "cls" else None,
            asked.use_cache,
            mean=pooling.kind == "mean",
            size=size if size < embedding.size else 0,
            unit=pooling.unit or 0 < size < embedding.size if asked.unit is None else asked.unit,
        )

    def _kept(self, asked: ScoresAsked, given: EncodedPrompt, field: str) -> EncodedPrompt:
        for most, last in ((asked.keep_first, False), (asked.keep_last, True)):
            if most is not None:
                length = len(given.ids)
                kept = min(length, self._limits.max_req_input_len if most < 0 else most)
                given = given.without(0, length - kept, field) if last else given.without(kept, length, field)
        return given


def _ended(ids: list[int], scoring: Scoring | None) -> list[int]:
    """A conversation with the token behind it that the model was trained to be read at."""
    ending = None if scoring is None else scoring.ending
    return ids if ending is None or ids[-1:] == [ending] else [*ids, ending]
