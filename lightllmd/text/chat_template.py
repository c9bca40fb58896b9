"""A conversation as the prompt that the model was trained on, by the model's own Jinja template.

The template is the operator's and still runs in a sandbox; the messages are a client's: they reach the template as
plain data, and their number and depth and the length of the prompt are bounded. So is the time, but it is looked at
between parts of the output only; what bounds one expression is the process that a server renders in.
The names that templates use beyond Jinja's (raise_exception, strftime_now, tojson, generation blocks) are those of
https://huggingface.co/docs/transformers/chat_templating_writing.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from lightllmd.errors import InvalidRequest
from lightllmd.text.message_parts import PartsWriter, knows_images
from lightllmd.text.tool_messages import as_texts, described, suited, with_contents

MAX_MESSAGES = 4096
MAX_DEPTH = 64  # of lists and objects inside each other
MAX_CHARACTERS = 32 << 20  # of the rendered prompt
MAX_SECONDS = 1.5  # of CPU time; where a client could reach it, the process that renders is bounded, too
_SYSTEM, _DEVELOPER = "system", "developer"
_PAIRS = (
    "score",
    "rerank",
)  # names of templates for a query and a document, as vLLM and sentence-transformers write them
_TOOLS = re.compile(r"\btools\b")
_NO_SYSTEM = re.compile(r"[Ss]ystem role not supported")
_PAIR_ROLES = (re.compile(r"[\"']query[\"']"), re.compile(r"[\"']document[\"']"))


class _TemplateRefusal(jinja2.TemplateError):
    """The template called raise_exception: it doesn't take this conversation, and says why."""


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` marks what training learns from; for a prompt it is just its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@jinja2.pass_context
def _unchanged(context: jinja2.runtime.Context, value: Any) -> Any:
    return value


def _raise_exception(message: object) -> None:
    raise _TemplateRefusal(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
        # Both: nothing is computed while a template is compiled, which happens where there is no bound.
        optimized=False,
        finalize=_unchanged,
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """Renders messages. Compiled once; rendering keeps no state, so any thread may call it."""

    def __init__(self, sources: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        """`sources`: the template, or several by name, of which "default" and "tool_use" are used, for pairs "score" or
        "rerank". `special_tokens`: bos_token, eos_token and the like, as templates name them. Raises ValueError on a
        syntax error."""
        named = {"default": sources} if isinstance(sources, str) else dict(sources)
        environment = _environment()
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in named.items():
            try:
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise ValueError(f"chat template {name!r}, line {error.lineno}: {error.message}") from None
        if not self._templates:
            raise ValueError("no chat template")
        self._knows_developer = {name for name, source in named.items() if _DEVELOPER in source}
        self._special_tokens = dict(special_tokens or {})
        self.source = named.get("default")  # for clients that render by themselves
        self.text = "\n".join(
            source for name, source in named.items() if name not in _PAIRS
        )  # of all that render chats
        self._for_pairs = _pair_template(named)
        # Else they are described in a message.
        self.takes_tools = "tool_use" in named or _TOOLS.search(self.text) is not None
        self._takes_system = not _NO_SYSTEM.search(self.text)
        self._knows_images = knows_images(self.text)

    @property
    def joins_pairs(self) -> bool:
        """Whether one of the templates is for a query and a document: by its name, or because the default one knows
        messages with these two roles."""
        return self._for_pairs is not None

    def render_pair(
        self,
        query: str,
        document: str,
        *,
        field: str,
        variables: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.process_time,
    ) -> str:
        """The prompt of a query and a document that are scored together, for which the template gets one message each,
        with the roles of these names. Only where `joins_pairs`; a refusal names `field`, otherwise as `render`."""
        assert self._for_pairs is not None
        names = {
            **self._special_tokens,
            "documents": None,
            **_plain(variables or {}, "chat_template_kwargs"),
            "messages": [{"role": "query", "content": query}, {"role": "document", "content": document}],
            "tools": None,
            "add_generation_prompt": True,
        }
        return self._run(self._templates[self._for_pairs], names, clock, field)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        image_tag: str | None = None,
        clock: Callable[[], float] = time.process_time,
    ) -> str:
        """The prompt, special tokens included: encode it with ``add_special_tokens=False``.

        A message has a ``role`` and a ``content`` (a string, None, or a list of parts); other keys reach the
        template as they are. Parts are texts or, with an `image_tag`, images (``{"type": "image"}``); for a template
        that knows no such parts they are that tag in the message's text. The role ``developer`` is ``system`` to a
        template that doesn't know it. `variables` are further names that the template may know, such as
        ``enable_thinking``. With `continue_final_message` the prompt ends where the last message's content does, so
        that the answer goes on with it.
        A template that knows no `tools` is told of them, and of calls and their results, in messages.
        Raises InvalidRequest with the template's own words when it refuses the conversation.
        """
        if len(messages) > MAX_MESSAGES:
            raise InvalidRequest(f"messages: {len(messages)} messages, at most {MAX_MESSAGES}")
        name = self._choose(bool(tools))
        parts = PartsWriter(image_tag, self._knows_images)
        plain = [_message(message, f"messages[{index}]", parts) for index, message in enumerate(messages)]
        if not self.takes_tools:
            plain = described(parts.flat(plain, bool(tools)), tools or (), takes_system=self._takes_system)
        elif any(message.get("tool_calls") for message in plain):
            plain = suited(plain, self.text)
        if name not in self._knows_developer:
            for message in plain:
                message["role"] = _SYSTEM if message["role"] == _DEVELOPER else message["role"]
        mark = _mark_end(plain) if continue_final_message else None
        parts.suit(plain)
        names = {
            **self._special_tokens,
            "documents": None,
            **_plain(variables or {}, "chat_template_kwargs"),
            "messages": plain,
            "tools": _plain(list(tools), "tools") if tools else None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        text = self._rendered(self._templates[name], names, clock)
        return text if mark is None else _up_to(text, mark)

    def _rendered(self, template: jinja2.Template, names: dict[str, Any], clock: Callable[[], float]) -> str:
        """Most templates take messages with calls as clients send them, but with arguments as objects. Some want a text
        for their content (Qwen3's), some for the arguments (DeepSeek's), which is seen when they fail."""
        try:
            return self._run(template, names, clock)
        except InvalidRequest as refused:
            refusal = refused
        for change in (with_contents, as_texts):
            if change(names["messages"]):
                try:
                    return self._run(template, names, clock)
                except InvalidRequest:
                    continue
        raise refusal

    def _choose(self, with_tools: bool) -> str:
        for name in ("tool_use", "default") if with_tools else ("default",):
            if name in self._templates:
                return name
        for name in self._templates:
            if name not in _PAIRS:
                return name
        raise InvalidRequest("messages: this model's only chat template is for a query and a document")

    @staticmethod
    def _run(
        template: jinja2.Template, names: dict[str, Any], clock: Callable[[], float], field: str = "messages"
    ) -> str:
        parts: list[str] = []
        length, deadline = 0, clock() + MAX_SECONDS
        try:
            for part in template.generate(names):
                parts.append(part)
                length += len(part)
                if length > MAX_CHARACTERS:
                    raise InvalidRequest(f"{field}: the rendered prompt is longer than {MAX_CHARACTERS} characters")
                if clock() > deadline:
                    raise InvalidRequest(f"{field}: rendering the prompt took more than {MAX_SECONDS:g} s of CPU time")
        except _TemplateRefusal as error:
            raise InvalidRequest(f"{field}: the model's chat template refuses them: {error}") from None
        except RecursionError:
            raise InvalidRequest(f"{field}: nested too deeply for the model's chat template") from None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            # what a template does with a message that lacks a key or has another type than it expects
            raise InvalidRequest(f"{field}: they don't suit the model's chat template: {error}") from None
        return "".join(parts)


def _pair_template(named: Mapping[str, str]) -> str | None:
    known = next((name for name in _PAIRS if name in named), None)
    if known is None and all(role.search(named.get("default", "")) for role in _PAIR_ROLES):
        return "default"
    return known


def _message(message: object, where: str, parts: PartsWriter) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where}: must be an object with role and content")
    if not isinstance(message.get("role"), str):
        raise InvalidRequest(f"{where}.role: must be a string")
    plain = _plain(message, where)
    if "content" in plain:
        plain["content"] = parts.content(plain["content"], f"{where}.content")
    calls = plain.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        _parse_arguments(call)
    return plain


def _mark_end(messages: list[dict[str, Any]]) -> str:
    """Puts a text behind the last message that no client can know, to find it again in the prompt."""
    last = messages[-1] if messages else {}
    content, name = last, "content"
    if isinstance(last.get("content"), list) and last["content"]:
        content, name = last["content"][-1], "text"
    if not isinstance(content.get(name), str):
        raise InvalidRequest("messages: the last one has no text that could be continued", param="messages")
    mark = f"<{secrets.token_hex(16)}>"
    content[name] += mark
    return mark


def _up_to(text: str, mark: str) -> str:
    head, found, _ = text.rpartition(mark)
    if not found:
        raise InvalidRequest(
            "continue_final_message: the model's chat template doesn't show the last message as it is",
            param="continue_final_message",
        )
    return head.replace(mark, "")


def _parse_arguments(call: object) -> None:
    """Clients send a tool call's arguments as a JSON text, templates expect the object."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = _plain(json.loads(function["arguments"]), "arguments")
        except (ValueError, RecursionError):
            return  # no JSON: the template sees the text


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A deep copy of JSON data. Anything else never reaches a template, nor does what is nested too deeply."""
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"{where}: nested deeper than {MAX_DEPTH} levels")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    raise InvalidRequest(f"{where}: {type(value).__name__} is no JSON value")
