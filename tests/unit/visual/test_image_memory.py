"""The memory that images are handed on in: sealed, without a name, gone with the last descriptor."""

from __future__ import annotations

import os

import pytest

from leftovers import no_new_descriptors
from lightllmd.visual.image_file import ImageFile
from lightllmd.visual.picture import Picture


def test_nothing_changes_in_a_file_that_was_handed_on() -> None:
    with no_new_descriptors(), ImageFile.of(b"GIF89a" * 1000) as file:
        assert file.read() == b"GIF89a" * 1000
        other = os.dup(file.fd)
        for change in (lambda: os.write(other, b"x"), lambda: os.truncate(other, 1), lambda: os.truncate(other, 9999)):
            with pytest.raises(PermissionError):
                change()
        os.close(other)


def test_pixels_outlive_the_descriptor() -> None:
    file = ImageFile.of(bytes(range(18)))
    with no_new_descriptors():
        picture = Picture(os.dup(file.fd), 3, 2)
        pixels = picture.pixels()
        picture.close()
        assert bytes(pixels) == bytes(range(18))
        pixels.release()
    with Picture(os.dup(file.fd), 3, 2) as picture:
        assert picture.image().getpixel((2, 1)) == (15, 16, 17)
