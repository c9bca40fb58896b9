"""The bodies of LightLLM's own routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lightllmd.errors import InvalidRequest
from lightllmd.requests.asked import Asked, FieldNames, Prompt
from lightllmd.requests.fields import Body, RefusedField
from lightllmd.requests.images import AskedImage, image_at, image_of_base64
from lightllmd.requests.parameters import Parameters
from lightllmd.requests.urgency import Urgency

_NAMES = FieldNames(
    sequences="parameters.best_of",
    new_tokens="parameters.max_new_tokens",
    stops="parameters.stop_sequences",
    prefix="parameters.",
)


MAX_IMAGES = 1 << 16  # in a body; how many a request may bring says the configuration
_UNSEEN = "this server takes no audio and no video; images are what it takes"


class NativeImage(Body):
    """One of `images`."""

    type: Literal["url", "base64"]
    data: Annotated[str, Field(min_length=1)] = Field(description="a URL: http, https, data: or file:; or base64")

    def image(self, field: str) -> AskedImage:
        """In no dialect. Raises InvalidRequest."""
        return image_at(self.data, field) if self.type == "url" else image_of_base64(self.data, field)


class Multimodal(Body):
    """`multimodal_params`: an image for each of the model's tags in the text, in their order."""

    described = True
    refused: ClassVar[Mapping[str, RefusedField]] = dict.fromkeys(
        ("audio", "audios", "video", "videos"), RefusedField((None, []), _UNSEEN)
    )

    images: Annotated[list[NativeImage], Field(max_length=MAX_IMAGES, fail_fast=True)] = []

    @classmethod
    def prepared(cls, body: dict[str, Any]) -> dict[str, Any]:
        """A body with such a field. Raises InvalidRequest for what is refused."""
        if isinstance(given := body.get("multimodal_params"), dict):
            return body | {"multimodal_params": cls.known(given, "multimodal_params.")}
        return body

    def asked(self) -> list[AskedImage]:
        """In no dialect. Raises InvalidRequest."""
        return [one.image(f"multimodal_params.images.{index}.data") for index, one in enumerate(self.images)]


class GenerateBody(Body):
    """The body of /generate and /generate_stream."""

    lenient = True

    inputs: str
    parameters: Parameters = Parameters()
    multimodal_params: Multimodal = Multimodal()

    @classmethod
    def prepare(cls, body: dict[str, Any]) -> dict[str, Any]:
        body = super().prepare(body)
        if isinstance(parameters := body.get("parameters"), dict):
            body = body | {"parameters": Parameters.known(parameters, "parameters.")}
        return Multimodal.prepared(body)

    @property
    def urgency(self) -> Urgency:
        """As `parameters` says it."""
        return self.parameters.urgency

    def asked(self, *, streamed: bool) -> Asked:
        """Raises InvalidRequest for what a stream can't do. Its frames have no place for log-probabilities of the
        prompt; return_all_prompt_logprobs is about answers in one piece."""
        sequences, logprobs = self.parameters.sequences, self.parameters.prompt_logprobs
        if streamed and sequences != 1:
            raise InvalidRequest(f"parameters.best_of: a stream has one sequence, so should be 1; got {sequences}")
        if streamed and logprobs is not None:
            raise InvalidRequest(
                f"parameters.prompt_logprobs: a stream doesn't show them, so should be absent; got {logprobs}"
            )
        prompt = Prompt(self.inputs, "inputs", True, self.multimodal_params.asked())
        return self.parameters.asked([prompt], _NAMES, shows_prompt=not streamed)


class GenerateOrStreamBody(GenerateBody):
    """The body of POST /."""

    described = True
    stream: bool = False


class TokensParameters(Body):
    """`parameters` of /tokens."""

    add_special_tokens: bool = True


class TokensBody(Body):
    """The body of /tokens."""

    lenient = True

    text: str
    parameters: TokensParameters = TokensParameters()
    multimodal_params: Multimodal = Multimodal()

    @classmethod
    def prepare(cls, body: dict[str, Any]) -> dict[str, Any]:
        return Multimodal.prepared(super().prepare(body))
