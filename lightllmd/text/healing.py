"""Token healing: the end of a prompt is taken back, and the model writes it again, as tokens of its own choice.

A prompt that is cut inside a word ends in tokens that the whole word doesn't have, so the model seldom finds the way
on. Where the prompt was cut well this costs nothing but the tokens: the model may write the very same ones again.
"""

from __future__ import annotations

from lightllmd.text.interface import Tokenizer

MOST = 2  # tokens taken back


def roll_back(prompt_ids: list[int], tokenizer: Tokenizer, most: int = MOST) -> tuple[list[int], bytes]:
    """(the ids to run, the bytes of those taken back): the last `most` tokens, of which fewer where the prompt would
    lose its first one.

    It ends at added tokens, special ones among them, because a text is cut there whatever follows, and at tokens
    without bytes.
    """
    added = tokenizer.vocabulary.added_ids
    kept = len(prompt_ids)
    while kept > max(1, len(prompt_ids) - most):
        last = prompt_ids[kept - 1]
        if last in added or not tokenizer.token_bytes(last):
            break
        kept -= 1
    return prompt_ids[:kept], b"".join(tokenizer.token_bytes(number) or b"" for number in prompt_ids[kept:])


def writable(tokenizer: Tokenizer) -> list[bytes | None]:
    """By id, the bytes of the tokens that texts are made of; None for special tokens and ids that are no token."""
    special = tokenizer.special_ids
    ids = range(tokenizer.vocab_size)
    return [None if number in special else tokenizer.token_bytes(number) or None for number in ids]
