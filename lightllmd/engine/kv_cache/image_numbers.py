"""Numbers that stand for images in the keys of the prompt cache.

A key has one int32 for each token. Of an image's tokens it is the image's number, below 0 as no token id is: a hash of
the content would have too few bits there for all the pairs of images that a cache meets. Numbers are given by a table,
so equal images have one and others never do. A token's place in its image need not be in the key: what is before it
says where the image begins.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightllmd.ipc.messages import ImageSpan

KEPT = 1 << 16  # images whose numbers are known; what a cache still has of others is found no more
_NUMBERS = 1 << 31  # after so many images they begin anew, long after all that had them was evicted

_Image = tuple[bytes, int, tuple[int, int, int]]


class ImageNumbers:
    """An image that is forgotten and comes again gets another number."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._numbers: OrderedDict[_Image, int] = OrderedDict()  # least recently used first
        self._given = 0

    def key_of(self, prompt_ids: Sequence[int], spans: Sequence[ImageSpan]) -> NDArray[np.int32]:
        """A prompt as the prompt cache compares it."""
        key = np.array(prompt_ids, np.int32)
        for span in spans:
            key[span.start : span.start + span.tokens] = self._number((span.key, span.tokens, span.grid))
        return key

    def _number(self, image: _Image) -> int:
        number = self._numbers.pop(image, None)
        if number is None:
            number = -1 - self._given % _NUMBERS
            self._given += 1
        self._numbers[image] = number
        if len(self._numbers) > self._kept:
            self._numbers.popitem(last=False)
        return number
