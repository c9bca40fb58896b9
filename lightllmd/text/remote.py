"""A tokenizer whose code the checkpoint brings along: it runs in a process of its own, this is its near side.

Only encoding and, where the class has its own, the making of chats need that process. What tokens look like is
exported once, when the process starts, so that detokenising, stop strings, healing and log-probabilities need nothing
of it. That is possible where decoding is putting together what each token says, which the process tries out before it
exports anything (`code_host.exporting`); another tokenizer is refused.
"""

from __future__ import annotations

import io
import os
import pickle
import select
import socket
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import msgspec

from lightllmd import errors
from lightllmd.config.stamps import Stamp, require_unchanged
from lightllmd.errors import InvalidRequest, LightllmdError, NotReady, RequestFailed
from lightllmd.remote_code.host import MEMORY, RUNNING, SECONDS, Host
from lightllmd.remote_code.orders import HEAD, LIGHT, Order, receive
from lightllmd.text.chat_template import ChatTemplate
from lightllmd.text.interface import Tokenizer
from lightllmd.text.pairs import PairFrame
from lightllmd.text.vocabulary import MAX_TOKENS, LeadingSpace, Vocabulary
from lightllmd.weights.model_files import invalid

_CALL_SECONDS = 300.0  # by the clock, of one call by `RemoteTokenizer` itself
_RAISED = {kind.__name__: kind for kind in (InvalidRequest, RequestFailed)}  # what a task may raise here


class Export(msgspec.Struct, frozen=True):
    """What a checkpoint's own tokenizer is like, as plain data. Lists are by token id."""

    tokens: list[str | None]  # as the class names them; None: no token has this id
    texts: list[str | None]  # see Vocabulary
    fragments: dict[int, bytes]
    byte_errors: str
    leading_space: str  # a LeadingSpace's value
    special_ids: list[int]
    added_ids: list[int]
    bos_id: int | None
    eos_ids: list[int]
    templates: dict[str, str]  # chat templates by name
    special_tokens: dict[str, str]  # by the names that templates know
    pair_frame: tuple[list[int], list[int], list[int]]  # before, between and after two texts that are encoded together
    own_chat: bool  # the class makes chats itself
    warnings: list[str]
    pid: int  # of the process

    def vocabulary(self) -> Vocabulary:
        """Raises ValueError for what is none."""
        texts, size = self.texts, len(self.tokens)
        if len(texts) != size or size > MAX_TOKENS:
            raise ValueError(f"{size} tokens and {len(texts)} texts")
        if any(text is None and number not in self.fragments for number, text in enumerate(texts)):
            raise ValueError("tokens without a text")
        return Vocabulary(
            self.tokens,
            frozenset(self.special_ids),
            frozenset(self.added_ids),
            texts=texts,
            fragments=self.fragments,
            byte_errors=self.byte_errors,
            leading_space=LeadingSpace(self.leading_space),
        )


class Forking(Protocol):
    """A process that forks others, each of which runs the tasks that come over its socket."""

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""

    def fork(self, kind: bytes) -> socket.socket:
        """Our end of the socket of a new process: `orders.LIGHT` or `HEAVY`. Raises OSError."""

    def unpack(self, name: str, answer: bytes | bytearray) -> Any:
        """The result of the task of that name. Raises what it raised."""

    def end(self) -> None:
        """At once, with all that it forked. Doesn't wait."""


class HostedTasks(Forking):
    """The process of one tokenizer, which has been loaded, and the tasks that it runs in processes that it forks: those
    of `api.helpers.tasks`, and `encode_batch` and `render_chat` of the tokenizer itself. Raises OSError."""

    def __init__(self, host: Host, pid: int) -> None:
        self._host = host
        # Its link to us may outlive it by the time that its guard takes.
        self._process = io.FileIO(os.pidfd_open(pid))
        self._watch = select.poll()
        self._watch.register(self._process, select.POLLIN)

    @property
    def alive(self) -> bool:
        return not self._process.closed and not self._watch.poll(0) and self._host.alive

    def fork(self, kind: bytes) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                socket.send_fds(self._host.link, [kind], [theirs.fileno()])
        except OSError:
            ours.close()
            raise
        return ours

    def unpack(self, name: str, answer: bytes | bytearray) -> Any:
        try:
            done, *rest = msgspec.msgpack.decode(answer, type=list[Any])
            if done:
                return _RESULTS.get(name, _as_it_is)(rest[0])
            kind, message, parameters = msgspec.convert(rest, tuple[str, str, dict[str, Any]])
        except (msgspec.MsgspecError, ValueError, TypeError, IndexError) as garbage:
            raise RequestFailed(f"the model's own tokenizer gave no answer that can be read: {garbage}") from None
        raise _RAISED.get(kind, RequestFailed)(message, **parameters)

    def end(self) -> None:
        self._process.close()
        self._host.let_go()


def _ids(raw: Any) -> array[int]:
    ids = array("i")
    ids.frombytes(msgspec.convert(raw, bytes))
    return ids


def _as_it_is(result: Any) -> Any:
    return result


_RESULTS: dict[str, Callable[[Any], Any]] = {
    "encode": lambda result: [_ids(one) for one in result],
    "encode_pairs": lambda result: [_ids(one) for one in result],
    "encode_batch": lambda result: [_ids(one) for one in result],
    "encode_chat": _ids,
    "encode_seeing": lambda result: (_ids(result[0]), msgspec.convert(result[1], list[int])),
    "encode_chat_seeing": lambda result: (_ids(result[0]), msgspec.convert(result[1], list[int])),
    "render": lambda result: msgspec.convert(result, str),
    "render_chat": lambda result: msgspec.convert(result, str),
    "count": lambda result: msgspec.convert(result, int),
    "tokenize": lambda result: msgspec.convert(result, bytes),
    "bad_words": lambda result: msgspec.convert(result, list[list[int]]),
}


class RemoteTokenizer(Tokenizer):
    """Encodes by asking its process and waiting, so not on an event loop: `Helpers` do the same there. A process that
    was ended is started again when it is needed."""

    def __init__(
        self,
        directory: str,
        reference: str,
        *,
        stamps: Sequence[Stamp] = (),
        eos_ids: Iterable[int] | None = None,
        limits: dict[str, Any] | None = None,
        seconds: float = SECONDS,
        memory: int = MEMORY,
    ) -> None:
        """`reference`: "module.Class". `stamps`: the files that have to be as they were, whenever the process starts.
        `limits`: those of requests, as tasks of api workers need them. `seconds` and `memory` bound its start.

        Raises ConfigInvalid where it can't be loaded or used, ModelChanged."""
        self.directory, self.reference = directory, reference
        self._stamps, self._seconds = stamps, seconds
        self._order = Order("tokenizer", directory, memory, {"reference": reference, "limits": limits})
        self._link: socket.socket | None = None  # to a process for the calls of this object itself
        self._opening: Host | None = None
        self._hosted: HostedTasks | None = None
        self._hosted, export = self._open()
        try:
            template = own_or_template(export)
            super().__init__(
                export.vocabulary(),
                bos_id=export.bos_id,
                eos_ids=export.eos_ids if eos_ids is None else eos_ids,
                chat_template=template,
                warnings=export.warnings,
            )
        except (ValueError, RecursionError) as unusable:
            self._hosted.end()
            raise invalid(f"{directory}: {reference}: what it exports can't be used: {unusable}") from None
        self.own_chat = export.own_chat
        self._frame = PairFrame(*export.pair_frame)

    def take_process(self) -> HostedTasks:
        """The process, for the caller to use and to end. Raises what the constructor raises."""
        hosted, self._hosted = self._hosted, None
        return hosted if hosted is not None and hosted.alive else self._open()[0]

    def close(self) -> None:
        if self._opening is not None:
            self._opening.let_go()
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._hosted is not None:
            self._hosted.end()
            self._hosted = None

    def _open(self) -> tuple[HostedTasks, Export]:
        require_unchanged(self._stamps)
        try:
            host = self._opening = Host(self._order, f"{RUNNING}, {self.reference},")
            try:
                answer = host.answer(self._seconds)
                try:
                    export = msgspec.convert(answer, Export)
                except msgspec.ValidationError as garbage:
                    raise invalid(f"{self.directory}: {self.reference}: its export can't be read: {garbage}") from None
                return HostedTasks(host, export.pid), export
            except BaseException:
                host.end()
                raise
            finally:
                self._opening = None
        except OSError as failure:
            raise invalid(f"{self.directory}: no process can be started to run its code: {failure.strerror}") from None

    @property
    def pair_frame(self) -> PairFrame:
        return self._frame

    # --- text to ids ----------------------------------------------------------------------------------------------

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._encode_batch([text], add_special_tokens)[0]

    def _encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        return [ids.tolist() for ids in self._call("encode_batch", list(texts), add_special_tokens)]

    def render_chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        if not self.own_chat:
            return super().render_chat(messages, **options)
        text: str = self._call("render_chat", list(messages), options)
        return text

    def _call(self, name: str, *arguments: Any) -> Any:
        """Raises NotReady where it ends in the middle of that."""
        if self._hosted is None or not self._hosted.alive:
            self.close()
            self._hosted = self._open()[0]
        try:
            if self._link is None:
                self._link = self._hosted.fork(LIGHT)
                self._link.settimeout(_CALL_SECONDS)
            body = pickle.dumps((name, _CALL_SECONDS, arguments), protocol=5)
            self._link.sendall(HEAD.pack(len(body)))
            self._link.sendall(body)
            answer = receive(self._link)
        except (OSError, EOFError):
            self.close()
            raise NotReady("the model's own tokenizer ended in the middle of a text") from None
        return self._hosted.unpack(name, answer)


def own_or_template(export: Export) -> ChatTemplate | None:
    """The chat template; one that only says that chats can be made, where the class makes them itself. Raises
    ValueError for one that is wrong."""
    if export.own_chat:
        return ChatTemplate({"": "{{ raise_exception('made by the tokenizer') }}"})
    return ChatTemplate(export.templates, export.special_tokens) if export.templates else None


def start_failure(failure: Exception) -> LightllmdError:
    """What requests are told while the process can't be started again."""
    words = "; ".join(one.message for one in failure.problems) if isinstance(failure, errors.ConfigInvalid) else failure
    return NotReady(f"the model's own tokenizer can't be started again: {words}")
