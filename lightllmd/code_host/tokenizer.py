"""A checkpoint's own tokenizer behind our interface, in the process that may run its code."""

from __future__ import annotations

import logging
import os
import socket
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from lightllmd.api.helpers.process import Task, zygote
from lightllmd.api.helpers.tasks import encoding_tasks
from lightllmd.code_host.classes import tokenizer_of
from lightllmd.code_host.exporting import export
from lightllmd.errors import InvalidRequest, LightllmdError, RequestFailed
from lightllmd.requests.limits import RequestLimits
from lightllmd.text.interface import Tokenizer
from lightllmd.text.pairs import PairFrame
from lightllmd.text.remote import Export, own_or_template

log = logging.getLogger(__name__)

After = Callable[[socket.socket, int], None]


class OwnTokenizer(Tokenizer):
    """`inner`: an object of the checkpoint's class. What that raises is told to the client as the model's fault."""

    def __init__(self, inner: Any, exported: Export) -> None:
        super().__init__(
            exported.vocabulary(),
            bos_id=exported.bos_id,
            eos_ids=exported.eos_ids,
            chat_template=own_or_template(exported),
        )
        self._inner = inner
        self._own_chat = exported.own_chat
        self._frame = PairFrame(*exported.pair_frame)

    @property
    def pair_frame(self) -> PairFrame:
        return self._frame

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return [int(number) for number in self._inner.encode(text, add_special_tokens=add_special_tokens)]
        except (MemoryError, LightllmdError):
            raise
        except Exception as failure:
            raise _failed("encode", failure) from None

    def render_chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        if not self._own_chat:
            return super().render_chat(messages, **options)
        if options.pop("continue_final_message", False):
            raise InvalidRequest(
                "continue_final_message: the model's tokenizer makes its chats itself and can't do that",
                param="continue_final_message",
            )
        variables = options.pop("variables", None) or {}
        try:
            text = self._inner.apply_chat_template(list(messages), tokenize=False, **options, **variables)
        except (MemoryError, LightllmdError):
            raise
        except Exception as failure:
            log.exception("the model's own tokenizer can't make a chat")
            told = f"messages: the model's tokenizer refuses them: {type(failure).__name__}: {failure}"
            raise InvalidRequest(told[:400]) from None
        if not isinstance(text, str):
            raise RequestFailed(f"the model's own tokenizer makes {type(text).__name__} of a chat, not a text")
        return text


def _failed(what: str, failure: Exception) -> RequestFailed:
    log.exception("the model's own tokenizer can't %s", what)
    return RequestFailed(f"the model's own tokenizer can't {what} this: {type(failure).__name__}: {failure}"[:400])


def serve(directory: str, reference: str, limits: dict[str, Any] | None = None) -> tuple[dict[str, Any], After]:
    """What the tokenizer is like (`Export`); from then on its process forks those that do tasks with it.

    `limits` as RequestLimits, for the tasks of api workers."""
    made = tokenizer_of(directory, reference)
    exported = msgspec.structs.replace(export(made), pid=os.getpid())
    own = OwnTokenizer(made, exported)
    tasks: dict[str, Task] = {"encode_batch": _encode_batch(own), "render_chat": _render_chat(own)}
    if limits is not None:
        tasks |= encoding_tasks(own, msgspec.convert(limits, RequestLimits))

    def fork(link: socket.socket, guard: int) -> None:
        zygote(tasks, link, guard, _packed)

    return msgspec.to_builtins(exported, builtin_types=(bytes,)), fork


def _encode_batch(own: Tokenizer) -> Task:
    return lambda texts, special: [array("i", ids) for ids in own.encode_batch(texts, special)]


def _render_chat(own: Tokenizer) -> Task:
    return lambda messages, options: own.render_chat(messages, **options)


def _packed(answer: tuple[Any, ...]) -> bytes:
    """Plain data: no object crosses into the process that asked."""
    return msgspec.msgpack.encode(answer, enc_hook=_raw)


def _raw(value: Any) -> bytes:
    if isinstance(value, array):
        return value.tobytes()
    raise TypeError(f"{type(value).__name__} is no plain data")
