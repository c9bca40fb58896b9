"""What helper processes do with a tokenizer, by name; also in the process of a checkpoint's own one."""

from __future__ import annotations

from functools import partial

from lightllmd.api.helpers.process import Task
from lightllmd.api.helpers.token_views import TokenViews
from lightllmd.requests.bad_words import bad_word_ids
from lightllmd.requests.encoding import Encoder
from lightllmd.requests.limits import RequestLimits
from lightllmd.requests.pair_encoding import PairEncoder
from lightllmd.text.interface import Tokenizer


def encoding_tasks(tokenizer: Tokenizer, limits: RequestLimits) -> dict[str, Task]:
    """Those that make token ids of texts, or prompts of conversations."""
    encoder, views = Encoder(tokenizer, limits), TokenViews(tokenizer, limits)
    return {
        "encode": encoder.encode,
        "encode_chat": encoder.encode_chat,
        "encode_seeing": encoder.encode_seeing,
        "encode_chat_seeing": encoder.encode_chat_seeing,
        "encode_pairs": PairEncoder(tokenizer, limits).encode,
        "render": encoder.render,
        "count": encoder.count,
        "tokenize": views.tokenize,
        "bad_words": partial(bad_word_ids, tokenizer=tokenizer),
    }
