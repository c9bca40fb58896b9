"""vLLM's routes that show what the tokenizer does, as clients count and cut with them: /tokenize, /detokenize
and /tokenizer_info."""

from __future__ import annotations

from typing import Annotated, Self

from fastapi import APIRouter
from pydantic import AfterValidator, Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from lightllmd.api.dialects.dialect import Dialect
from lightllmd.api.dialects.openai.chat_tools import ToolDefinition
from lightllmd.api.dialects.openai.conversation import Conversation, Messages
from lightllmd.api.inflight.revision import Revision
from lightllmd.api.inflight.revisions import Revisions
from lightllmd.api.web import bodies
from lightllmd.api.web.errors import openai_error
from lightllmd.api.web.ignored_fields import NamingRoute
from lightllmd.api.web.responses import encoded_response, json_response
from lightllmd.dialogue.tools import MAX_TOOLS, Dialogue, check_tools
from lightllmd.requests.asked import Chat, Prompt
from lightllmd.requests.faults import contradiction
from lightllmd.requests.fields import Body, Count, packed


class TokenizeBody(Conversation):
    """A prompt, or a conversation."""

    described = True
    lenient = True

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="around a prompt; absent: yes. A conversation has those of the chat template"
    )
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        default=None, description="of a conversation, as /v1/chat/completions has them"
    )
    return_token_strs: bool = Field(default=False, description="tokens as the model's files write them, too")

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise contradiction("prompt", "one of prompt and messages is required, and not both")
        if self.messages is not None and self.add_special_tokens:
            raise contradiction("add_special_tokens", "add_special_tokens is for a prompt; the chat template adds them")
        if self.messages is None and self.tools:
            raise contradiction("tools", "tools are for messages; there are none")
        check_tools(self.dialogue)
        return self

    @property
    def dialogue(self) -> Dialogue:
        """In no dialect."""
        return Dialogue([one.function.tool(f"tools.{at}.function") for at, one in enumerate(self.tools or ())])


class DetokenizeBody(Body):
    """The body of /detokenize."""

    lenient = True

    model: str | None = None
    tokens: Annotated[list[Count], Field(fail_fast=True), AfterValidator(packed)]


def router(revisions: Revisions) -> APIRouter:
    """The routes about texts and tokens alone."""
    routes = APIRouter(tags=["tokenizer"], route_class=NamingRoute)
    parse = bodies.parser(revisions.current.http, revisions.decode)

    def revision_for(model: str | None) -> Revision:
        revisions.check_name(revisions.current, model)
        return revisions.current

    @routes.post("/tokenize", openapi_extra=bodies.documented(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        """The token ids of a prompt or of a rendered conversation."""
        body = await parse(request, TokenizeBody)
        revision = revision_for(body.model)
        texts = revision.texts
        text, special = body.prompt or "", body.add_special_tokens is not False
        if body.messages is not None:
            chat = body.chat(body.messages)
            prepared = revision.intake.conventions.prepare(chat.messages, chat.options, body.dialogue)
            chat = Chat(prepared.messages, prepared.options, chat.images)
            if chat.images:
                ids = await revision.intake.ids(Prompt(chat, "messages", False))
                return encoded_response(await texts.shown_ids(ids, strings=body.return_token_strs))
            text, special = await texts.render(chat), False
        return encoded_response(await texts.tokenized(text, add_special_tokens=special, strings=body.return_token_strs))

    @routes.post("/detokenize", openapi_extra=bodies.documented(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special ones included."""
        body = await parse(request, DetokenizeBody)
        return encoded_response(await revision_for(body.model).texts.detokenized(body.tokens))

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """The special tokens and the chat template, for clients that render conversations by themselves."""
        revision = revisions.current
        tokenizer, template = revision.tokenizer, revision.tokenizer.chat_template
        names = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.eos_ids), None)}
        tokens = {name: None if token is None else tokenizer.id_to_token(token) for name, token in names.items()}
        return json_response(
            tokens
            | {
                "pad_token": None,
                "chat_template": None if template is None else template.source,
                "model_max_length": revision.limits.max_req_total_len,
            }
        )

    return routes


DIALECT = Dialect(("/tokenize", "/detokenize"), openai_error, (TokenizeBody, DetokenizeBody), router, name="OpenAI")
