"""What is asked about the daemon rather than of the model: health, load, name, metrics."""

from __future__ import annotations

import asyncio
import math
from functools import partial

from fastapi import APIRouter
from starlette.responses import Response

from lightllmd import __version__
from lightllmd.api.inflight.revisions import Revisions
from lightllmd.api.web.responses import json_response, on_each
from lightllmd.observe import metrics

_TEXT = {"type": "string"}
# As OpenAPI's document has it.
_UNAVAILABLE = {
    "description": "No engine can answer now; the message says why.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"status": _TEXT, "message": _TEXT},
                "required": ["status", "message"],
            }
        }
    },
}


def router(revisions: Revisions, metrics_dir: str) -> APIRouter:
    """The routes about the daemon."""
    routes = APIRouter(tags=["daemon"])

    @on_each(routes, "/health", ["GET", "HEAD"])
    @on_each(routes, "/healthz", ["GET", "HEAD"])
    async def health() -> Response:
        """200 when a request would be answered now; passive, runs nothing."""
        revisions.check_health()
        return json_response({"message": "Ok"})

    @on_each(routes, "/liveness", ["GET", "POST"])
    async def liveness() -> Response:
        """200 as long as this worker's loop turns."""
        return json_response({"status": "ok"})

    @on_each(routes, "/readiness", ["GET", "POST"], responses={503: _UNAVAILABLE})
    async def readiness() -> Response:
        """200 when a request would be answered now, else 503 with the reason."""
        trouble = revisions.trouble
        if trouble is None:
            return json_response({"status": "ok"})
        return unavailable({"status": "unavailable", "message": trouble})

    @on_each(routes, "/get_model_name", ["GET", "POST"])
    async def get_model_name() -> Response:
        return json_response({"model_name": revisions.current.model_name})

    @routes.get("/version")
    async def version() -> Response:
        """Of this program."""
        return json_response({"version": __version__})

    @routes.get("/token_load")
    async def token_load() -> Response:
        """Shares of the KV slots: in use, and what the admitted requests may come to need at worst."""
        load = revisions.current.ledger.load
        used = load.slots_used / load.slots_total if load is not None and load.slots_total else 0.0
        peak = load.estimated_peak if load is not None else 0.0
        return json_response({"current_load": used, "logical_max_load": peak, "dynamic_max_load": peak})

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """The sum over all processes of this daemon."""
        text = await asyncio.get_running_loop().run_in_executor(None, partial(metrics.render, metrics_dir))
        return Response(text, headers={"Content-Type": metrics.CONTENT_TYPE_LATEST})

    def unavailable(body: dict[str, str]) -> Response:
        response = json_response(body, 503)
        response.headers["Retry-After"] = str(max(1, math.ceil(revisions.health.retry_after)))
        return response

    return routes
