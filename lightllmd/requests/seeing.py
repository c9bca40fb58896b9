"""From the images of a prompt to the tokens that they are there, by what the visual worker sees of them.

Each image is one id in the tokenised text first. The visual worker, which has the pixels, says how many tokens it is;
then that id is repeated, and the run of it is an `ImageSpan`. No pixel and no file comes by here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self

import msgspec

from lightllmd.config.plan import Plan
from lightllmd.errors import InvalidRequest, NotReady
from lightllmd.ipc.messages import ImageSpan
from lightllmd.requests.asked import Chat
from lightllmd.requests.images import AskedImage, images_in_markdown
from lightllmd.requests.limits import Ids
from lightllmd.requests.text_work import TextWork
from lightllmd.text.image_places import ImageText

FAKE_TAG = "<image>"  # of the fake engine


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

    def ends_with_image(self) -> bool:
        """Whether its last token is an image's."""
        return bool(self.images) and self.images[-1].start + self.images[-1].tokens == len(self.ids)

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
    ids: Sequence[int], places: Sequence[int], facts: Sequence[SeenImage]
) -> tuple[list[int], list[ImageSpan]]:
    """With as many tokens in each of the `places` as the image there is."""
    made: list[int] = []
    spans, end = [], 0
    for place, image in zip(places, facts, strict=True):
        made += ids[end:place]
        spans.append(ImageSpan(len(made), image.tokens, image.key, image.grid))
        made += [ids[place]] * image.tokens
        end = place + 1
    return [*made, *ids[end:]], spans


class ImageIntake:
    """Of one plan. `sight`: None where no images are served."""

    def __init__(self, plan: Plan, work: TextWork, sight: Sight | None) -> None:
        self._work, self._sight = work, sight
        self._text = image_text(plan)
        self._refusal = "" if self._text is not None else refusal(plan)
        params, settings = plan.config.params, plan.config.images
        self._most, self._bound = settings.max_images, "images.max_images"
        if params.cache_capacity < self._most:
            self._most, self._bound = params.cache_capacity, "cache_capacity"

    def read(self, text: str, field: str) -> tuple[str, list[AskedImage]]:
        """A text whose images are Markdown's, with the model's tags in their places; where no images are served it is
        a text."""
        return (text, []) if self._text is None else images_in_markdown(text, self._text.tag, field)

    def check(self, images: Sequence[AskedImage]) -> None:
        """Of one prompt. Raises InvalidRequest where they are not served, or too many."""
        if not images:
            return
        field = images[0].field
        if self._text is None:
            raise InvalidRequest(f"{field}: {self._refusal}", param=field, code="images_not_served")
        if len(images) > self._most:
            field = images[self._most].field
            raise InvalidRequest(
                f"{field}: {len(images)} images in a request, more than {self._bound} = {self._most}", param=field
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
        assert self._text is not None
        ids, places = await self._work.encode_seeing(
            content, field, self._text, len(images), add_special_tokens=add_special_tokens, cut=cut
        )
        shown = shown or await self.show(images, holding)
        facts = shown.of(images)
        size = len(ids) + sum(image.tokens for image in facts)
        made, spans = await self._work.compute(size, expanded, ids, places, facts)
        return EncodedPrompt(made, spans, shown.seen)


def image_text(plan: Plan) -> ImageText | None:
    """How this plan's prompts say that there is an image; None: it serves none."""
    if plan.vision is None:
        return None
    return ImageText(FAKE_TAG)


def refusal(plan: Plan) -> str:
    """Why a plan serves no images, and what would."""
    model = plan.model
    if model is not None and not model.sees:
        return (
            f"this server's model is one of text ({model.model_type}), which takes no images; a model that sees does, "
            "served with enable_multimodal = true"
        )
    return 'this server takes no images: enable_multimodal is false; true or "auto" switches them on'
