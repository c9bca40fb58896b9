"""Opens the tokenizer that a plan, a directory or a GGUF file names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightllmd.config.plan import Plan
from lightllmd.config.stamps import require_unchanged
from lightllmd.errors import ConfigInvalid, Problem, WeightsInvalid
from lightllmd.remote_code.named import TOKENIZER
from lightllmd.text.chat_template import ChatTemplate
from lightllmd.text.ids import IdTokenizer
from lightllmd.text.interface import Tokenizer
from lightllmd.text.remote import RemoteTokenizer
from lightllmd.text.vocabulary import Vocabulary, split_texts
from lightllmd.weights.model_files import usable

_PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class ByteTokenizer(Tokenizer):
    """The fake backend's: ids 0..255 are the bytes of the UTF-8 text, 256 ends a generation."""

    EOS = 256

    def __init__(self, eos_ids: Sequence[int] = (EOS,)) -> None:
        texts, fragments = split_texts([*(bytes([byte]) for byte in range(256)), b"<eos>"])
        names: list[str | None] = [f"<0x{byte:02X}>" for byte in range(256)]
        vocabulary = Vocabulary(
            [*names, "<eos>"], frozenset({self.EOS}), frozenset({self.EOS}), texts=texts, fragments=fragments
        )
        super().__init__(vocabulary, eos_ids=eos_ids, chat_template=ChatTemplate(_PLAIN_TEMPLATE))

    @property
    def longest_token(self) -> int:
        return 1

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


def load_tokenizer(plan: Plan, *, encodes: bool = True, limits: dict[str, Any] | None = None) -> Tokenizer:
    """The tokenizer of the model that a generation serves. The caller logs its `warnings`, and closes it.

    `encodes`: False where only ids are made text. `limits`: as `RemoteTokenizer`. Raises ConfigInvalid, and
    ModelChanged where its files are not those of the plan."""
    if plan.model is None:
        return ByteTokenizer(plan.eos_id)
    require_unchanged(plan.model.text_stamps)
    if reference := plan.model.remote_code.get(TOKENIZER):
        stamps = plan.model.text_stamps
        own = RemoteTokenizer(plan.model.path, reference, stamps=stamps, eos_ids=plan.eos_id, limits=limits)
        if not encodes:
            own.close()
        return own
    if plan.model.format == "dummy" and not plan.model.has_tokenizer:
        return IdTokenizer(plan.vocab_size)
    return open_tokenizer(plan.model.path, None, plan.tokenizer_mode, plan.eos_id)


def open_tokenizer(
    path: str | os.PathLike[str],
    file_format: str | None = None,
    mode: str = "auto",
    eos_ids: Sequence[int] | None = None,
) -> Tokenizer:
    """`file_format`: "gguf", or anything else for a directory; None tells by the path. `mode`: auto, slow or fast.

    `eos_ids`: the ids that end a generation; None takes what the model's files say. Raises ConfigInvalid.
    """
    path = Path(path)
    if file_format is None:
        file_format = "gguf" if path.suffix == ".gguf" and not path.is_dir() else "huggingface"
    with usable(path):
        return (_of_gguf if file_format == "gguf" else _of_directory)(path, mode, eos_ids)


def _of_gguf(path: Path, mode: str, eos_ids: Sequence[int] | None) -> Tokenizer:
    from lightllmd.text.gguf_vocab import open_metadata
    from lightllmd.weights.gguf_header import read_gguf_header

    try:
        metadata = read_gguf_header(path).metadata
    except WeightsInvalid as damaged:
        raise ConfigInvalid([Problem("model_dir", damaged.message)]) from None
    try:
        return open_metadata(metadata, mode, eos_ids)
    except ConfigInvalid as refused:
        raise ConfigInvalid([Problem("model_dir", f"{path}: {one.message}") for one in refused.problems]) from None


def _of_directory(path: Path, mode: str, eos_ids: Sequence[int] | None) -> Tokenizer:
    from lightllmd.text.huggingface import open_directory

    return open_directory(path, mode, eos_ids)
