"""Small sentencepiece models, trained on the spot."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import sentencepiece

SENTENCE = "the quick brown fox jumps over the lazy dog while naïve cafés in 北京 sell 你好 tea for 12345 + 67 yen"
WORDS = SENTENCE.split()


def train(path: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """Written to `path`; `options` are the trainer's."""
    sentences = [" ".join(WORDS[start:] + WORDS[:start]) for start in range(len(WORDS))] * 4
    sentences += ["def f(x):", "    return x**2", "a  b   c", "[INST] hi [/INST]"] * 6
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        **{
            "vocab_size": 460,
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "hard_vocab_limit": False,
            **options,
        },
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
