"""What /tokenize and /detokenize answer, as JSON: of texts and ids of any length, so that helper processes make it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from lightllmd.errors import InvalidRequest
from lightllmd.requests.limits import RequestLimits
from lightllmd.text.interface import Tokenizer

_MOST_CHARACTERS = 64 << 20  # of a text that ids stand for: each may have a hundred
_AT_ONCE = 4096  # ids


class TokenViews:
    """Of one tokenizer and the limits of its plan."""

    def __init__(self, tokenizer: Tokenizer, limits: RequestLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits

    def tokenize(self, text: str, add_special_tokens: bool, strings: bool) -> bytes:
        """`strings`: with the tokens as the model's files write them. Raises InvalidRequest."""
        return self.tokenized(self._tokenizer.encode(text, add_special_tokens), strings)

    def tokenized(self, ids: Sequence[int], strings: bool) -> bytes:
        """The same of ids."""
        shown = {
            "count": len(ids),
            "max_model_len": self._limits.max_req_total_len,
            "tokens": ids,
            "token_strs": [self._tokenizer.id_to_token(token) for token in ids] if strings else None,
        }
        return msgspec.json.encode(shown)

    def detokenize(self, ids: Sequence[int]) -> bytes:
        """Special tokens included. Raises InvalidRequest."""
        self._limits.token_ids(ids, "tokens")
        stream = self._tokenizer.detokenizer(
            skip_special_tokens=False, spaces_between_special_tokens=False, print_eos_token=None
        )
        parts, length = [], 0
        for first in range(0, len(ids), _AT_ONCE):
            parts.append(stream.push(ids[first : first + _AT_ONCE]))
            length += len(parts[-1])
            if length > _MOST_CHARACTERS:
                raise InvalidRequest(f"tokens: their text has more than {_MOST_CHARACTERS} characters", param="tokens")
        return msgspec.json.encode({"prompt": "".join(parts) + stream.flush()})
