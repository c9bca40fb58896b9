"""The routes of Text Generation Inference (`use_tgi_api`), which stand in the place of LightLLM's own: /generate,
/generate_stream, /, /info, and its names for /health. Source: TGI's API documentation and its router, versions 1 to 3.

Departures: a stream that is refused before its first event has the status of its error, not 200; return_full_text is
false on every route where the body doesn't say; the headers that tell times leave out the time in the queue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lightllmd import __version__
from lightllmd.api.dialects.dialect import Dialect, Responder, Translation
from lightllmd.api.dialects.openai.bodies import MAX_PROMPTS
from lightllmd.api.dialects.tgi.bodies import MAX_BEST_OF, TgiBody, TgiEitherBody
from lightllmd.api.dialects.tgi.errors import error_frame, tgi_error, tgi_status
from lightllmd.api.dialects.tgi.shape import EventFrames, Shown
from lightllmd.api.inflight.pending import Pending
from lightllmd.api.inflight.revision import Revision
from lightllmd.api.inflight.revisions import Revisions
from lightllmd.api.web import bodies
from lightllmd.api.web.ignored_fields import NamingRoute
from lightllmd.api.web.responses import json_response
from lightllmd.requests.fields import MAX_LOGPROBS
from lightllmd.requests.intake import AdmittedJob
from lightllmd.text.stop import MAX_STOPS

Kind = TypeVar("Kind", bound=TgiBody)


@dataclass(frozen=True)
class TgiReply:
    """Of the three routes that generate."""

    shown: Shown
    compute_type: str
    characters: int  # of the prompt
    listed: bool

    def whole(self, pending: Pending) -> Any:
        """See `Reply`."""
        answer = self.shown.answer(pending.entries[0])
        return [answer] if self.listed else answer

    def frames(self, pending: Pending) -> EventFrames:
        """See `Reply`."""
        return EventFrames(pending, self.shown)

    def headers(self, pending: Pending) -> dict[str, str]:
        """Those of TGI: times in milliseconds, but the compute time in seconds."""
        told = {"x-compute-type": self.compute_type, "x-compute-characters": str(self.characters)}
        (entry,) = pending.entries
        if entry.ended_at is None:
            return told
        generated = len(self.shown.ranked(entry)[0].ids)
        total = entry.ended_at - entry.arrived_at
        inference = entry.ended_at - entry.started_at
        return told | {
            "x-compute-time": f"{total:.6f}",
            "x-total-time": _milliseconds(total),
            "x-validation-time": _milliseconds(entry.started_at - entry.arrived_at),
            "x-inference-time": _milliseconds(inference),
            "x-time-per-token": _milliseconds(inference / max(1, generated)),
            "x-prompt-tokens": str(entry.prompt_tokens),
            "x-generated-tokens": str(generated),
        }


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))


def _translation(kind: type[Kind], streamed: Callable[[Kind], bool], *, listed: bool = False) -> Translation[Kind]:
    async def reply(revision: Revision, body: Kind, jobs: Sequence[AdmittedJob]) -> TgiReply:
        given, beams, (job,) = body.parameters, revision.intake.beams, jobs
        drawn = job.params.do_sample and not (beams and job.params.n > 1)
        shown = Shown(
            revision.tokenizer,
            body.inputs if given.return_full_text else "",
            given.detailed,
            given.top_n_tokens,
            None if not drawn else job.params.seed if given.seed is None else given.seed,
            beams,
        )
        compute = "cpu" if revision.plan.device.kind == "cpu" else "gpu"
        return TgiReply(shown, compute, len(body.inputs), listed)

    return Translation(
        kind,
        lambda body: body.asked(streamed=streamed(body)),
        reply,
        streamed,
        error_frame,
        answer_size=lambda body: (
            len(body.inputs) * body.parameters.sequences if body.parameters.return_full_text else 0
        ),
        headers=TgiReply.headers,
    )


GENERATE = _translation(TgiBody, lambda body: False)
GENERATE_STREAM = _translation(TgiBody, lambda body: True)
EITHER = _translation(TgiEitherBody, lambda body: body.stream, listed=True)


def info(revision: Revision) -> dict[str, Any]:
    """What /info tells, by TGI's names, old and new."""
    plan, limits = revision.plan, revision.limits
    params, http = plan.config.params, plan.config.http
    return {
        "model_id": revision.model_name,
        "model_sha": None,
        "model_dtype": f"torch.{plan.data_type}",
        "model_device_type": plan.device.kind,
        "model_pipeline_tag": "text-generation" if plan.vision is None else "image-text-to-text",
        "max_concurrent_requests": limits.running_max_req_size + limits.max_queue,
        "max_best_of": min(MAX_BEST_OF, limits.running_max_req_size),
        "max_stop_sequences": MAX_STOPS,
        "max_top_n_tokens": MAX_LOGPROBS,
        "max_input_length": limits.max_req_input_len,
        "max_input_tokens": limits.max_req_input_len,
        "max_total_tokens": limits.max_req_total_len,
        "waiting_served_ratio": 0.0,
        "max_batch_total_tokens": limits.max_total_token_num,
        "max_waiting_tokens": params.router_max_wait_tokens,
        "max_batch_size": limits.running_max_req_size,
        "max_client_batch_size": MAX_PROMPTS,
        "validation_workers": http.workers,
        "router": "lightllmd",
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }


def router(revisions: Revisions) -> APIRouter:
    """The routes of the TGI format."""
    routes = APIRouter(tags=["tgi"], route_class=NamingRoute)
    responder = Responder(revisions)

    @routes.post("/generate", openapi_extra=bodies.documented(TgiBody))
    async def generate(request: Request) -> Response:
        """Generates, then answers with the whole text."""
        return await responder.respond(request, GENERATE)

    @routes.post("/generate_stream", openapi_extra=bodies.documented(TgiBody, streams="always"))
    async def generate_stream(request: Request) -> Response:
        """Server-sent events, one for each token."""
        return await responder.respond(request, GENERATE_STREAM)

    @routes.post("/", openapi_extra=bodies.documented(TgiEitherBody))
    async def either(request: Request) -> Response:
        """/generate_stream if `stream` is true, else /generate, whose answer is in a list then."""
        return await responder.respond(request, EITHER)

    @routes.get("/info")
    async def model_info() -> Response:
        """What is served, and its bounds."""
        return json_response(info(revisions.current))

    @routes.get("/")
    @routes.get("/ping")
    async def ping() -> Response:
        """As /health."""
        revisions.check_health()
        return json_response({"message": "Ok"})

    return routes


DIALECT = Dialect(("/",), tgi_error, (TgiBody, TgiEitherBody), router, tgi_status, name="TGI")
