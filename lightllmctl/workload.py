"""What a benchmark asks for: lengths, prompts and arrivals, all drawn from seeds, so that two servers get the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

# For prompts of text. One token each in the usual vocabularies, so that a length in tokens is about one in words.
WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they "
    "which one you were all her she there would their we him been has when who will no more if out so up said what "
    "its about than into them can only other time new some could these two may first then do any like my now over"
)


@dataclass(frozen=True)
class Lengths:
    """How many tokens: all numbers from `least` to `most` alike, or as people's conversations are (`log_mean` set).

    The ShareGPT-like form is ``min(most, max(least, int(lognormvariate(log_mean, log_sigma))))``.
    """

    least: int
    most: int
    log_mean: float | None = None
    log_sigma: float = 1.0

    def draw(self, source: random.Random) -> int:
        """One length in tokens."""
        if self.log_mean is None:
            return source.randint(self.least, self.most)
        return min(self.most, max(self.least, int(source.lognormvariate(self.log_mean, self.log_sigma))))


SHAREGPT_INPUT = Lengths(4, 2048, 4.8, 1.2)
SHAREGPT_OUTPUT = Lengths(4, 1024, 4.9, 1.0)


def parse_lengths(text: str, sharegpt: Lengths) -> Lengths:
    """``100:1024``, ``512`` or ``sharegpt``. Raises ValueError."""
    if text == "sharegpt":
        return sharegpt
    parts = text.split(":")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"{text!r} is neither LEAST:MOST, nor a number of tokens, nor sharegpt")
    lengths = Lengths(int(parts[0]), int(parts[-1]))
    if not 1 <= lengths.least <= lengths.most:
        raise ValueError(f"{text!r}: 1 <= LEAST <= MOST is needed")
    return lengths


def draw_lengths(inputs: Lengths, outputs: Lengths, count: int, seed: int) -> list[tuple[int, int]]:
    """(prompt tokens, new tokens) of each request. All inputs are drawn before all outputs."""
    source = random.Random(seed)
    prompts = [inputs.draw(source) for _ in range(count)]
    return list(zip(prompts, [outputs.draw(source) for _ in range(count)], strict=True))


def draw_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the beginning; a Poisson process of `rate` requests per second. The first comes at once."""
    source = random.Random(seed)
    return [0.0, *accumulate(source.expovariate(rate) for _ in range(count - 1))]


def draw_ids(length: int, vocabulary: int, source: random.Random) -> list[int]:
    """Token ids, all alike."""
    return source.choices(range(vocabulary), k=length)


def prompt_maker(kind: str, vocabulary: int, seed: int) -> Callable[[int], str | list[int]]:
    """Length -> prompt. `kind`: "ids", "numbers" (ids in decimal, for models without a tokenizer) or "words"."""
    source = random.Random(seed)
    if kind == "words":
        words = WORDS.split()
        return lambda length: " ".join(source.choices(words, k=length))
    if kind == "numbers":
        return lambda length: " ".join(map(str, draw_ids(length, vocabulary, source)))
    return lambda length: draw_ids(length, vocabulary, source)
