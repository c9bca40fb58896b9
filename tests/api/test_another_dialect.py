"""A further dialect is two translations and its routes: nothing else knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from api.frontend_harness import expected, run, stack
from lightllmd.api.app import build_app, dialects_of
from lightllmd.api.dialects.dialect import Dialect, Responder, Translation
from lightllmd.api.inflight.event_stream import Frames
from lightllmd.api.inflight.pending import Pending
from lightllmd.api.inflight.revision import Revision
from lightllmd.api.inflight.revisions import Revisions
from lightllmd.api.web import bodies
from lightllmd.api.web.auth import AcceptedKeys
from lightllmd.api.web.limits import Leases
from lightllmd.config.keys import KeyRing
from lightllmd.errors import LightllmdError, RequestError
from lightllmd.ipc.messages import SamplingParams
from lightllmd.ipc.quota import Quota
from lightllmd.requests.asked import Asked, FieldNames, Prompt
from lightllmd.requests.branch import TextOptions
from lightllmd.requests.fields import Body
from lightllmd.requests.intake import AdmittedJob


class Telegram(Body):
    """Its own names for everything."""

    wire: str
    words: int = Field(ge=1)
    until: list[str] = []
    live: bool = False

    def asked(self) -> Asked:
        params = SamplingParams(max_new_tokens=self.words)
        names = FieldNames("wire", "words", stops="until")
        prompts = [Prompt(self.wire, "wire", True)]
        return Asked(prompts, params, TextOptions(), names, None, self.words, stop_texts=self.until)


class Reply:
    """Whole or line by line."""

    def whole(self, pending: Pending) -> Any:
        return {"reply": pending.entries[0].branches[0].text}

    def frames(self, pending: Pending) -> Lines:
        return Lines(pending)


class Lines(Frames):
    def __init__(self, pending: Pending) -> None:
        self.branch, self.sent = pending.entries[0].branches[0], 0

    def take(self) -> bytes:
        first, self.sent = self.sent, len(self.branch.texts)
        return "".join(f"{text}|" for text in self.branch.texts[first:]).encode()

    def end(self) -> bytes:
        return b"STOP"

    def error(self, error: RequestError) -> bytes:
        return b"LOST"


async def reply(revision: Revision, body: Telegram, jobs: Sequence[AdmittedJob]) -> Reply:
    return Reply()


SEND = Translation(Telegram, Telegram.asked, reply, lambda body: body.live, lambda error: b"LOST")


def router(revisions: Revisions) -> APIRouter:
    routes, responder = APIRouter(), Responder(revisions)

    @routes.post("/telegraph/send", openapi_extra=bodies.documented(Telegram))
    async def send(request: Request) -> Response:
        return await responder.respond(request, SEND)

    return routes


def told(error: LightllmdError) -> dict[str, Any]:
    return {"trouble": error.message, "about": error.parameters.get("param")}


TELEGRAPH = Dialect(("/telegraph/",), told, (Telegram,), router)


def test_a_further_dialect_needs_no_change_elsewhere(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            keys = AcceptedKeys(KeyRing())
            app = build_app(
                one.worker.revisions,
                metrics_dir="",
                keys=keys,
                leases=Leases(Quota()),
                dialects=(*dialects_of(one.plan), TELEGRAPH),
            )
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:

                async def send(**body: Any) -> httpx.Response:
                    return await client.post("/telegraph/send", json=body)

                text = expected("hi", 4)
                assert (await send(wire="hi", words=4)).json() == {"reply": text}
                assert (await send(wire="hi", words=4, until=[text[1]])).json() == {"reply": text[:2]}
                assert (await send(wire="hi", words=4, live=True)).text == "".join(f"{c}|" for c in text) + "STOP"

                # Limits, bounds and the names of its own fields.
                refused = await send(wire="hi", words=3072)
                assert (refused.status_code, refused.json()["about"]) == (400, "words")
                assert "max_req_total_len = 3072 (words)" in refused.json()["trouble"]
                assert (await send(wire="", words=1)).json() == {
                    "trouble": "wire: the prompt has no tokens",
                    "about": "wire",
                }
                assert "words: should be greater than or equal to 1; got 0" in (await send(wire="x", words=0)).text
                assert "unknown field" in (await send(wire="x", words=1, word=2)).json()["trouble"]

                # Others' errors keep their shape, and its body is documented.
                assert "message" in (await client.post("/generate", json={})).json()
                assert "error" in (await client.post("/v1/completions", json={})).json()
                schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
                assert {"Telegram", "GenerateBody", "ChatBody"} <= schemas.keys()

    run(scenario())
