"""What turns pictures into image embeddings: the model's own tower, or for tests something that costs nothing."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lightllmd.architecture.vision.layout import ImageLayout
from lightllmd.config.plan import Plan
from lightllmd.errors import EngineError
from lightllmd.visual.picture import Picture

FAKE_VALUE = 4  # bytes


@dataclass(frozen=True)
class EncodedImage:
    """`values`: little-endian numbers of the plan's data type."""

    values: memoryview
    shape: tuple[int, int, int]  # [1 + deepstack, tokens, hidden]


class PictureEncoder(Protocol):
    """Everything but `layout` takes time: for a thread. One call of `load` and `encode` at a time."""

    def load(self, progress: Callable[[int, int], None]) -> None:
        """`progress` is told bytes so far, and all. Raises ConfigInvalid, WeightsInvalid, ModelChanged, OutOfMemory."""

    def warm_up(self) -> None:
        """Encodes something, so that memory is known to be enough. Raises OutOfMemory."""

    def layout(self, width: int, height: int) -> ImageLayout:
        """How an image of so many pixels lies in a prompt. Raises InvalidRequest for sizes that the model refuses."""

    def prepare(self, picture: Picture) -> Any:
        """What `encode` takes."""

    def encode(self, prepared: Sequence[Any]) -> list[EncodedImage]:
        """All of them together."""


class FakeEncoder:
    """Of a picture's content, and nothing else, follows its embedding. `seconds`: what each batch takes."""

    def __init__(self, tokens: int, hidden: int, seconds: float = 0.0) -> None:
        self._tokens, self._hidden, self._seconds = tokens, hidden, seconds
        self.batches: list[int] = []  # images of each

    def load(self, progress: Callable[[int, int], None]) -> None:
        """At once."""
        progress(1, 1)

    def warm_up(self) -> None:
        """Nothing to do."""

    def layout(self, width: int, height: int) -> ImageLayout:
        """Always as many tokens."""
        return ImageLayout(self._tokens)

    def prepare(self, picture: Picture) -> bytes:
        """A digest."""
        return hashlib.blake2b(picture.pixels()).digest()

    def encode(self, prepared: Sequence[bytes]) -> list[EncodedImage]:
        """Repeated digests as whole numbers between 0 and 255, in float32."""
        import numpy as np

        time.sleep(self._seconds)
        self.batches.append(len(prepared))
        count = self._tokens * self._hidden
        made = (np.resize(np.frombuffer(one, np.uint8), count).astype("<f4") for one in prepared)
        return [EncodedImage(memoryview(one.tobytes()), (1, self._tokens, self._hidden)) for one in made]


class ModelEncoder:
    """The tower and connector of the plan's model, on the device that the plan says."""

    def __init__(self, plan: Plan) -> None:
        if plan.vision is None or plan.model is None or plan.model.vision is None:
            raise EngineError("the plan has no images")
        self._plan, self._vision, self._model, self.spec = plan, plan.vision, plan.model, plan.model.vision
        self._encoder: Any = None

    def load(self, progress: Callable[[int, int], None]) -> None:
        """Imports torch, too."""
        import torch

        from lightllmd.models.vision.loading import load_encoder

        device = torch.device("cuda", 0) if self._vision.devices else torch.device("cpu")
        if not self._vision.devices:
            torch.set_num_threads(max(1, self._plan.threads))
        dtype = getattr(torch, self._vision.data_type)
        dummy = self._plan.config.params.load_way == "DUMMY"
        self._encoder = load_encoder(self._model, device, dtype, progress, dummy)

    def warm_up(self) -> None:
        """A picture of a usual size, by itself."""
        from PIL.Image import new

        from lightllmd.visual.pixels import prepare

        self.encode([prepare(self.spec, new("RGB", (336, 336), (127, 127, 127)))])

    def layout(self, width: int, height: int) -> ImageLayout:
        """As the geometry says."""
        return self.spec.geometry.layout(width, height)

    def prepare(self, picture: Picture) -> Any:
        """As the model's own processor does."""
        from lightllmd.visual.pixels import prepare

        return prepare(self.spec, picture.image())

    def encode(self, prepared: Sequence[Any]) -> list[EncodedImage]:
        """On the device, then copied to the host."""
        import torch

        made = []
        for tensor in (tensor for part in self._parts(prepared) for tensor in self._encoder.encode(part)):
            rows, tokens, hidden = tensor.shape
            values = tensor.contiguous().to("cpu").view(torch.uint8).numpy()
            made.append(EncodedImage(memoryview(values).cast("B"), (rows, tokens, hidden)))
        return made

    def _parts(self, prepared: Sequence[Any]) -> Iterator[list[Any]]:
        """As many together as memory is planned for."""
        part: list[Any] = []
        patches = 0
        for one in prepared:
            own = self.spec.patches(one.layout)
            if part and patches + own > self._vision.patches:
                yield part
                part, patches = [], 0
            part.append(one)
            patches += own
        if part:
            yield part


def encoder_for(plan: Plan) -> PictureEncoder:
    """Of this plan."""
    if plan.config.engine.backend == "fake":
        assert plan.vision is not None
        hidden = plan.vision.token_bytes // FAKE_VALUE
        return FakeEncoder(plan.vision.most_tokens, hidden)
    return ModelEncoder(plan)
