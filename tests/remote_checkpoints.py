"""Tiny checkpoints that bring code of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightllmd.config.plan import ModelFacts
from lightllmd.config.stamps import stamp
from model_folders import write_folder

CONFIG_CODE = """\
from transformers import PretrainedConfig


class OddConfig(PretrainedConfig):
    model_type = "llama"

    def __init__(self, width=8, **rest):
        super().__init__(**{**rest, "hidden_size": 2 * width, "vocab_size": 100})
"""


def write_code(folder: Path, files: Mapping[str, str], **maps: Mapping[str, Any]) -> Path:
    """A tiny llama with .py files beside it; `maps`: settings file without ".json" -> entries to put into it."""
    write_folder(folder)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name, entries in maps.items():
        path = folder / f"{name}.json"
        settings = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(settings | entries))
    return folder


# Token n is the character n, the end of a text is 256; texts with certain words do what a tokenizer should not.
TOKENIZER_CODE = """\
import os
import signal
import time

from transformers import PreTrainedTokenizer

class OddTokenizer(PreTrainedTokenizer):
    def __init__(self, **rest):
        super().__init__(**rest)

    @property
    def vocab_size(self):
        return 256

    def get_vocab(self):
        return {f"t{number}": number for number in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text, **_):
        if "HANG" in text:
            signal.signal(signal.SIGPROF, signal.SIG_IGN)
            time.sleep(10**6)
        if "SPIN" in text:
            while True:
                pass
        if "EXIT" in text:
            os._exit(0)
        if "LEAVE" in text:
            raise SystemExit(3)
        if "RAISE" in text:
            raise KeyError("odd")
        if "HOARD" in text:
            kept = [bytearray(1 << 24) for _ in range(1000)]
        if "FORK" in text and os.fork() == 0:
            os.setsid()
            signal.pause()
        if "PRINT" in text:
            print("printed " * 1000)
        return [f"t{ord(letter)}" for letter in text]

    def _convert_token_to_id(self, token):
        return int(token[1:])

    def _convert_id_to_token(self, number):
        return f"t{number}"

    def convert_tokens_to_string(self, tokens):
        return "".join(chr(int(token[1:])) if token[0] == "t" else token for token in tokens)
"""
REFERENCE = "tokenization_odd.OddTokenizer"
TEMPLATE = "{% for message in messages %}{{ message.role }}={{ message.content }};{% endfor %}"


def write_tokenizer(folder: Path, code: str = TOKENIZER_CODE, **settings: Any) -> Path:
    """A tiny llama with the tokenizer above, of 257 ids."""
    config = {"vocab_size": 257, "eos_token_id": 256}
    (folder).mkdir(exist_ok=True)
    write_code(
        folder,
        {"tokenization_odd.py": code},
        config=config,
        tokenizer_config={
            "auto_map": {"AutoTokenizer": [REFERENCE, None]},
            "tokenizer_class": "OddTokenizer",
            "eos_token": "<end>",
            "chat_template": TEMPLATE,
            **settings,
        },
    )
    (folder / "tokenizer.json").unlink()
    return folder


def remote_facts(folder: Path) -> ModelFacts:
    """As the probe tells them, without a look at the tokenizer."""
    return ModelFacts(
        path=str(folder),
        format="dummy",
        model_type="llama",
        hf_config={},
        files=[],
        weight_elements=0,
        weight_bytes=0,
        checkpoint_dtype=None,
        context_length=None,
        eos_ids=[256],
        has_tokenizer=True,
        has_chat_template=True,
        remote_code={"AutoTokenizer": REFERENCE},
        stamps=[stamp(str(path)) for path in sorted(folder.iterdir())],
    )
