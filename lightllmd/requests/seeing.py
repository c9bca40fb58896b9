"""From the images of a prompt to the tokens that they are there, by what the visual worker sees of them.

Each image is one id in the tokenised text first. The visual worker, which has the pixels, says how many tokens it is;
then that id is repeated, and the run of it is an `ImageSpan`. No pixel and no file comes by here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple, Protocol, Self

import msgspec

from lightllmd.architecture.vision.placeholder import ImageTokens, Placeholder
from lightllmd.architecture.vision.unbuilt import unbuilt
from lightllmd.config.plan import Plan
from lightllmd.errors import InvalidRequest, NotReady, RequestError
from lightllmd.ipc.messages import ImageSpan
from lightllmd.requests.asked import Chat
from lightllmd.requests.images import AskedImage, images_in_markdown
from lightllmd.requests.limits import Ids
from lightllmd.requests.text_work import TextWork
from lightllmd.text.ids import IdTokenizer
from lightllmd.text.image_places import ImageText
from lightllmd.text.interface import Tokenizer

FAKE = Placeholder("<image>", 0)  # of the fake engine


class SeenImage(Protocol):
    """What is known of an image: of the same content, the same."""

    @property
    def key(self) -> bytes:
        """See `ImageSpan.key`."""

    @property
    def tokens(self) -> int:
        """That it is in a prompt."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """See `ImageSpan.grid`."""


class SeenImages(Protocol):
    """The images of one prompt, which are kept for it until they are released."""

    @property
    def facts(self) -> Sequence[SeenImage]:
        """One for each image, in their order."""

    def release(self) -> None:
        """The request needs them no more. A second time nothing happens."""

    def when_lost(self, tell: Callable[[RequestError], None]) -> None:
        """`tell` is called if they can't be kept any longer: an engine that has not had them yet will never have them.
        Not after they were released."""


class Sight(Protocol):
    """The way to what sees images."""

    async def show(self, images: Sequence[AskedImage]) -> SeenImages:
        """Fetches, decodes and keeps them, all or none. Raises InvalidRequest, which names the field of the one that
        can't be used, NotReady, QueueFull."""


class Holding:
    """What the prompts of a body have had shown so far; let go of where the body is refused."""

    def __init__(self) -> None:
        self._seen: list[SeenImages] = []

    def add(self, seen: SeenImages) -> None:
        """Of one prompt."""
        self._seen.append(seen)

    def release(self) -> None:
        """All of it."""
        for seen in self._seen:
            seen.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.release()


class ShownImages:
    """The images of a prompt, which the visual worker has seen."""

    def __init__(self, images: Sequence[AskedImage], seen: SeenImages) -> None:
        self.images, self.seen = images, seen
        self._facts = {id(image): fact for image, fact in zip(images, seen.facts, strict=True)}

    def of(self, images: Sequence[AskedImage]) -> list[SeenImage]:
        """What is known of some of them."""
        return [self._facts[id(image)] for image in images]


class EncodedPrompt(NamedTuple):
    """A prompt's tokens. `images` as `Submit.images`; `seen`: those that are in them, and perhaps others."""

    ids: Ids
    images: Sequence[ImageSpan] = ()
    seen: SeenImages | None = None

    @property
    def behind_images(self) -> int:
        """Tokens after the last one of an image: all, where there is no image."""
        return len(self.ids) - (self.images[-1].start + self.images[-1].tokens if self.images else 0)

    def without(self, first: int, end: int, field: str) -> EncodedPrompt:
        """Without the tokens from `first` to `end`. Raises InvalidRequest where that cuts an image."""
        if first >= end:
            return self
        ids = self.ids[:first] + self.ids[end:]  # type: ignore[operator]
        kept = []
        for span in self.images:
            last = span.start + span.tokens
            if first < last and span.start < end:
                if first <= span.start and last <= end:
                    continue
                raise InvalidRequest(
                    f"{field}: to fit, the prompt would go without its tokens {first} to {end - 1}, and cut an image "
                    f"(tokens {span.start} to {last - 1}); send a shorter prompt",
                    param=field,
                    code="context_length_exceeded",
                )
            kept.append(msgspec.structs.replace(span, start=span.start - (end - first)) if span.start >= end else span)
        return EncodedPrompt(ids, kept, self.seen)


def expanded(
    ids: Sequence[int], places: Sequence[int], facts: Sequence[SeenImage], tokens: ImageTokens
) -> tuple[list[int], list[ImageSpan]]:
    """With as many tokens in each of the `places` as the image there is, and what stands around them."""
    made: list[int] = []
    spans, end = [], 0
    for place, image in zip(places, facts, strict=True):
        made += ids[end:place]
        start, own = tokens.of(image.tokens)
        spans.append(ImageSpan(len(made) + start, image.tokens, image.key, image.grid))
        made += own
        end = place + 1
    return [*made, *ids[end:]], spans


class ImageIntake:
    """Of one plan. `sight`: None where no images are served."""

    def __init__(self, plan: Plan, tokenizer: Callable[[], Tokenizer], work: TextWork, sight: Sight | None) -> None:
        self._work, self._sight, self._tokenizer = work, sight, tokenizer
        self._placeholder = None if plan.vision is None else _placeholder(plan)
        self._vocabulary = plan.vocab_size
        self._refusal = "" if plan.vision is not None else refusal(plan)
        params, settings = plan.config.params, plan.config.images
        self._most, self._bound = settings.max_images, "images.max_images"
        if params.cache_capacity < self._most:
            self._most, self._bound = params.cache_capacity, "cache_capacity"

    @cached_property
    def _tokens(self) -> ImageTokens:
        """Raises ConfigInvalid where the tokenizer has not what the model needs."""
        assert self._placeholder is not None
        tokenizer = self._tokenizer()
        if isinstance(tokenizer, IdTokenizer):  # random weights without a tokenizer: one token is as good as another
            image = self._placeholder.image
            return ImageTokens(image if isinstance(image, int) else 0)
        return self._placeholder.resolved(_ids(tokenizer))

    @cached_property
    def _text(self) -> ImageText:
        assert self._placeholder is not None
        return ImageText(self._placeholder.tag, self._placeholder.tags, self._tokens.image, self._placeholder.around)

    @cached_property
    def _run(self) -> ImageTokens:
        """As a prompt has them: an id outside the model's vocabulary is another one there, which nothing reads."""
        tokens = self._tokens
        return tokens if tokens.image < self._vocabulary else replace(tokens, image=0)

    def read(self, text: str, field: str) -> tuple[str, list[AskedImage]]:
        """A text whose images are Markdown's, with the model's tags in their places; where no images are served it is
        a text."""
        return (text, []) if self._placeholder is None else images_in_markdown(text, self._placeholder.tag, field)

    def check(self, images: Sequence[AskedImage]) -> None:
        """Of one prompt. Raises InvalidRequest where they are not served, or too many."""
        if not images:
            return
        field = images[0].field
        if self._placeholder is None:
            raise InvalidRequest(f"{field}: {self._refusal}", param=field, code="images_not_served")
        if len(images) > self._most:
            field = images[self._most].field
            raise InvalidRequest(
                f"{field}: {len(images)} images in a request, more than {self._bound} = {self._most}", param=field
            )

    def check_tags(self, text: str, images: int, field: str) -> None:
        """Of a text whose tags are images' places. Raises InvalidRequest for tags where it has no images; of others
        that is found when it is tokenised."""
        if self._placeholder is None or images or not any(tag in text for tag in self._placeholder.tags):
            return
        raise InvalidRequest(
            f"{field}: it has an image tag ({self._placeholder.tag}) and the request no images; each tag is an image's "
            "place",
            param=field,
        )

    async def show(self, images: Sequence[AskedImage], holding: Holding) -> ShownImages:
        """Those of one prompt, at least one. Raises what `Sight.show` raises, and what `check` raises."""
        self.check(images)
        if self._sight is None:
            raise NotReady("this server's visual worker is not there yet")
        seen = await self._sight.show(images)
        holding.add(seen)
        return ShownImages(images, seen)

    async def given(
        self,
        content: str | Chat,
        images: Sequence[AskedImage],
        field: str,
        holding: Holding,
        *,
        cut: bool,
        add_special_tokens: bool = False,
        shown: ShownImages | None = None,
    ) -> EncodedPrompt:
        """A prompt with `images`, at least one, which are among those that were `shown`, or are shown now. Raises
        InvalidRequest, and what `Sight.show` raises."""
        self.check(images)
        ids, places = await self._work.encode_seeing(
            content, field, self._text, len(images), add_special_tokens=add_special_tokens, cut=cut
        )
        shown = shown or await self.show(images, holding)
        facts = shown.of(images)
        size = len(ids) + sum(image.tokens for image in facts)
        made, spans = await self._work.compute(size, expanded, ids, places, facts, self._run)
        return EncodedPrompt(made, spans, shown.seen)


def refusal(plan: Plan) -> str:
    """Why a plan serves no images, and what would."""
    model = plan.model
    if model is not None and (fault := unbuilt(model.hf_config)):
        return f"this server takes no images: {fault}"
    if model is not None and not model.sees:
        return (
            f"this server's model is one of text ({model.model_type}), which takes no images; a model that sees does, "
            "served with enable_multimodal = true"
        )
    return 'this server takes no images: enable_multimodal is false; true or "auto" switches them on'


def _placeholder(plan: Plan) -> Placeholder:
    """Of a plan that serves images."""
    seen = plan.model.vision if plan.model is not None else None
    return FAKE if seen is None else seen.placeholder


def _ids(tokenizer: Tokenizer) -> Callable[[str], int | None]:
    """The id of a token by its text."""

    def id_of(text: str) -> int | None:
        tokens = tokenizer.vocabulary.tokens
        added = (number for number in tokenizer.vocabulary.added_ids if tokens[number] == text)
        if (number := next(added, None)) is not None:
            return number
        ids = tokenizer.encode(text, False)
        return ids[0] if len(ids) == 1 else None

    return id_of
