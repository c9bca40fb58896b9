"""Images of `LLM`'s prompts, seen in its own process: read and measured when a prompt is checked, encoded when it runs.

The caller's own images need no process that guards against them; what a batch file names is fetched as the daemon
fetches it. Nothing is kept of an image but what it was given as, until it has been encoded.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightllmd.config.files import read_bytes
from lightllmd.config.plan import Plan
from lightllmd.engine.images.prompt_images import ImageEmbedding, PromptImages, positions_in_grids
from lightllmd.errors import InvalidRequest, RequestError
from lightllmd.ipc.messages import Submit
from lightllmd.requests.faults import shown
from lightllmd.requests.images import AskedImage, image_at
from lightllmd.visual.image_file import ImageFile, ImageRefused
from lightllmd.visual.limits import DecodeLimits, FetchLimits

if TYPE_CHECKING:
    from PIL.Image import Image

    from lightllmd.architecture.vision.layout import PreparedImage
    from lightllmd.models.vision.encoder import ImageEncoder

_URLS = ("http://", "https://", "data:", "file:")


@dataclass(frozen=True)
class OfflineFacts:
    """See `SeenImage`."""

    key: bytes
    tokens: int
    grid: tuple[int, int, int]


class OfflineSeen:
    """See `SeenImages`: nothing has to be released."""

    def __init__(self, facts: list[OfflineFacts], given: list[Any]) -> None:
        self.facts = facts
        self.given = {one.key: what for one, what in zip(facts, given, strict=True)}

    def release(self) -> None:
        """See `SeenImages`."""

    def when_lost(self, tell: Callable[[RequestError], None]) -> None:
        """See `SeenImages`: they are not."""


def asked_image(given: Any, field: str) -> AskedImage:
    """What a caller gives for an image: one of PIL's, its file as bytes, a path or a URL. Raises InvalidRequest."""
    if isinstance(given, str) and given.lower().startswith(_URLS):
        found = image_at(given, field)
        return AskedImage(field, "own", Path(found.content)) if found.kind == "file" else found
    if isinstance(given, str | os.PathLike):
        return AskedImage(field, "own", Path(given))
    if isinstance(given, bytes | bytearray | memoryview) or hasattr(given, "getexif"):
        return AskedImage(field, "own", given)
    raise InvalidRequest(
        f"{field}: should be an image of PIL, bytes of an image's file, a path or a URL; got {shown(given)}",
        param=field,
    )


class OfflineSight:
    """A `Sight` of one plan, and the embeddings of what it has seen: cache_capacity of them are kept."""

    def __init__(self, plan: Plan) -> None:
        assert plan.vision is not None
        assert plan.model is not None
        spec = plan.model.vision
        assert spec is not None
        self._plan, self._vision, self._spec = plan, plan.vision, spec
        self._encoder: ImageEncoder | None = None
        self._kept: OrderedDict[bytes, tuple[int, bytes]] = OrderedDict()  # layers, values
        self._limits = FetchLimits.of(plan.config.images)

    async def show(self, images: Sequence[AskedImage]) -> OfflineSeen:
        """See `Sight`."""
        facts, given = [], []
        for image in images:
            what = image.content if image.kind == "own" else await self._fetched(image)
            picture = self._picture(what, image.field)
            layout = self._spec.geometry.layout(picture.width, picture.height)
            content = b"%d %d " % picture.size + picture.tobytes()
            facts.append(OfflineFacts(blake2b(content, digest_size=16).digest(), layout.tokens, layout.grid))
            given.append(what)
        return OfflineSeen(facts, given)

    def load(self) -> None:
        """The encoder, beside the engine. Raises WeightsInvalid, ConfigInvalid."""
        import torch

        from lightllmd.models.vision.loading import load_encoder

        model, devices = self._plan.model, self._vision.devices
        assert model is not None
        device = torch.device("cuda", devices[0]) if devices else torch.device("cpu")
        dtype = getattr(torch, self._vision.data_type)
        self._encoder = load_encoder(model, device, dtype, lambda done, total: None)

    def of(self, message: Submit, seen: OfflineSeen) -> PromptImages | None:
        """Those of a request, encoded."""
        spans = message.images
        if not spans:
            return None
        known = self.embeddings(seen)
        embeddings = [ImageEmbedding(known[span.key][0], span.tokens, memoryview(known[span.key][1])) for span in spans]
        grids = self._spec.positions == "grid"
        positions = positions_in_grids(spans, len(message.prompt_ids)) if grids else None
        return PromptImages(spans, embeddings, whole=self._spec.bidirectional, positions=positions)

    def embeddings(self, seen: OfflineSeen) -> dict[bytes, tuple[int, bytes]]:
        """By key how many layers there are values for, and ``[layers, tokens, hidden]`` of the plan's data type."""
        found = {key: self._kept[key] for key in seen.given if key in self._kept}
        for batch in self._batches(seen, [key for key in seen.given if key not in found]):
            found |= self._encoded(batch)
        self._keep(found)
        return found

    def _batches(self, seen: OfflineSeen, keys: Sequence[bytes]) -> Iterator[list[tuple[bytes, PreparedImage]]]:
        """As many at a time as there is memory for."""
        from lightllmd.visual.pixels import prepare

        batch: list[tuple[bytes, PreparedImage]] = []
        patches = 0
        for key in keys:
            prepared = prepare(self._spec, self._picture(seen.given[key], "images"))
            own = self._spec.patches(prepared.layout)
            if batch and patches + own > self._vision.patches:
                yield batch
                batch, patches = [], 0
            batch.append((key, prepared))
            patches += own
        if batch:
            yield batch

    def _encoded(self, batch: Sequence[tuple[bytes, PreparedImage]]) -> Iterator[tuple[bytes, tuple[int, bytes]]]:
        import torch

        if self._encoder is None:
            self.load()
        assert self._encoder is not None
        encoded = self._encoder.encode([prepared for _, prepared in batch])
        for (key, _), made in zip(batch, encoded, strict=True):
            values = made.to("cpu").contiguous()
            yield key, (len(values), values.view(torch.uint8).numpy().tobytes())

    def _keep(self, found: dict[bytes, tuple[int, bytes]]) -> None:
        for key, one in found.items():
            self._kept[key] = one
            self._kept.move_to_end(key)
        while len(self._kept) > self._vision.capacity:
            self._kept.popitem(last=False)

    async def _fetched(self, image: AskedImage) -> bytes:
        from lightllmd.visual.fetch import Fetcher

        source = _Source(image.kind, image.content, image.content)
        memory = ImageFile.of(image.content.encode()) if image.kind == "data" else None
        try:
            with await Fetcher(self._limits).fetch(source, -1 if memory is None else memory.fd) as file:
                return file.read()
        except ImageRefused as refused:
            raise InvalidRequest(f"{image.field}: {refused.message}", param=image.field) from None
        finally:
            if memory is not None:
                memory.close()

    def _picture(self, given: Any, field: str) -> Image:
        """In RGB, turned as its EXIF says, over white where it is transparent. Raises InvalidRequest."""
        from lightllmd.visual.read_image import ReadImage, as_seen, check_size

        limits = DecodeLimits.of(self._plan.config.images)
        try:
            if isinstance(given, Path):
                given = read_bytes(given, limits.max_bytes)
            if not hasattr(given, "getexif"):
                return ReadImage(bytes(given), limits).image()
            check_size(given.width, given.height, limits)
            return as_seen(given)
        except ImageRefused as refused:
            raise InvalidRequest(f"{field}: {refused.message}", param=field) from None
        except (OSError, ValueError) as unusable:
            raise InvalidRequest(f"{field}: can't be read as an image: {unusable}", param=field) from None


@dataclass(frozen=True)
class _Source:
    kind: str
    url: str
    path: str
