"""A decoded image: its pixels, as every preprocessing takes them."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Picture:
    """`fd`: a sealed memfd, which this owns, of RGB pixels [height, width, 3] in rows, a byte each, the top row first.

    Turned as its EXIF says; transparent parts over white; 16 bits cut to 8; colour profiles are not applied.
    """

    fd: int
    width: int
    height: int
    first_of_several: bool = False  # the first frame or page of an image that has more

    @property
    def size(self) -> int:
        """Bytes of the pixels."""
        return 3 * self.width * self.height

    def pixels(self) -> memoryview:
        """All of them, mapped, not copied; valid for as long as it is kept, even after `close`."""
        return memoryview(mmap.mmap(self.fd, self.size, prot=mmap.PROT_READ))

    def image(self) -> Image:
        """A copy of them for pillow, mode RGB."""
        from PIL import Image

        return Image.frombytes("RGB", (self.width, self.height), self.pixels())

    def close(self) -> None:
        """Lets go of the descriptor."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()  # what a thread has made for a task that was cancelled meanwhile

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
