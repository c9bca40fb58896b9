"""The bodies of LightLLM's own routes."""

from __future__ import annotations

from typing import Any

from lightllmd.errors import InvalidRequest
from lightllmd.requests.asked import Asked, FieldNames, Prompt
from lightllmd.requests.fields import Body
from lightllmd.requests.parameters import Parameters
from lightllmd.requests.urgency import Urgency

_NAMES = FieldNames(
    sequences="parameters.best_of",
    new_tokens="parameters.max_new_tokens",
    stops="parameters.stop_sequences",
    prefix="parameters.",
)


class Multimodal(Body):
    """`multimodal_params`; images are not built yet."""

    images: list[Any] = []


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
        multimodal = body.get("multimodal_params")
        if isinstance(multimodal, dict) and multimodal.get("images"):
            raise InvalidRequest("multimodal_params.images: not available yet", param="multimodal_params.images")
        return body

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
        return self.parameters.asked([Prompt(self.inputs, "inputs", True)], _NAMES, shows_prompt=not streamed)


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
