"""From an image's file to its pixels: run in a process that may crash, loop or be taken over by what it reads."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from PIL import Image, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin

from lightllmd.visual.formats import HEAD, format_of, webp_size
from lightllmd.visual.image_file import ImageRefused
from lightllmd.visual.limits import DecodeLimits

# Pillow registers a format when its module is imported, and imports more of them when it opens an image, where no file
# can be opened any more.
Image.preinit()  # BMP, GIF, JPEG, PNG
_REGISTERED = (MpoImagePlugin, TiffImagePlugin, WebPImagePlugin)
Image.MAX_IMAGE_PIXELS = None

_STRIP = 1 << 20  # pixels that are converted at a time
_ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_HIGH_BYTE = {"I;16": 1, "I;16L": 1, "I;16B": 0}  # where it is in 16 bits
_DEEP = {"I": "32-bit integers", "F": "floating-point numbers"}
_MOST_WORDS = 160  # characters of what pillow says

Made = TypeVar("Made")


class ReadImage:
    """One image. `size` is that of the pixels, turned; raises ImageRefused before anything of them is decoded where the
    limits don't allow it. `header_read` is told the pixels that are about to be decoded.

    MemoryError passes through: the caller knows what may be taken.
    """

    def __init__(self, data: bytes, limits: DecodeLimits, header_read: Callable[[int], None] = lambda _: None) -> None:
        self.format = format_of(data[:HEAD])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.format == "WEBP":
                header_read(check_size(*self._webp_size(data), limits))
            image = self._named(lambda: Image.open(io.BytesIO(data), formats=[self.format]))
            pixels = check_size(*image.size, limits)
            if image.mode in _DEEP:
                raise ImageRefused(f"its samples are {_DEEP[image.mode]}; 8 and 16 bits are taken")
            self.first_of_several = self._named(lambda: bool(getattr(image, "is_animated", False)))
            header_read(pixels)
            self._named(image.load)
            self._image = _turned(image)
        self.width, self.height = self._image.size

    def rows(self) -> Iterator[bytes]:
        """The pixels, RGB, some rows at a time. Raises ImageRefused."""
        step = max(1, _STRIP // self.width)
        for top in range(0, self.height, step):
            box = (0, top, self.width, min(self.height, top + step))
            yield self._named(partial(self._strip, box))

    def image(self) -> Image.Image:
        """The whole image, mode RGB. Raises ImageRefused."""
        return self._named(lambda: _rgb(self._image))

    def _webp_size(self, data: bytes) -> tuple[int, int]:
        size = webp_size(data[:HEAD])
        if size is None:
            raise ImageRefused("its file begins as WEBP and cannot be read as such")
        return size

    def _strip(self, box: tuple[int, int, int, int]) -> bytes:
        return _rgb(self._image.crop(box)).tobytes()

    def _named(self, act: Callable[[], Made]) -> Made:
        """Whatever pillow raises for a file, as one of our refusals."""
        try:
            return act()
        except (MemoryError, ImageRefused):
            raise
        except Image.UnidentifiedImageError:
            raise ImageRefused(f"its file begins as {self.format} and cannot be read as such") from None
        except Exception as failure:
            text = " ".join(str(failure).split())[:_MOST_WORDS]
            if "truncated" in text.lower() or isinstance(failure, EOFError):
                raise ImageRefused(f"its {self.format} file is cut off") from None
            raise ImageRefused(f"its {self.format} file is damaged: {text or type(failure).__name__}") from None


def as_seen(image: Image.Image) -> Image.Image:
    """One that the caller has made itself, in mode RGB. Raises ValueError for a mode that has no colours."""
    return _rgb(_turned(image))


def _turned(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def check_size(width: int, height: int, limits: DecodeLimits) -> int:
    """How many pixels there are. Raises ImageRefused where there may not be so many, or no such sides."""
    if width < 1 or height < 1:
        raise ImageRefused(f"it has {width} x {height} pixels")
    if width * height > limits.max_pixels:
        raise ImageRefused(
            f"it has {width} x {height} = {width * height} pixels; at most {limits.max_pixels} may be, "
            "[images] max_pixels"
        )
    if max(width, height) > limits.max_ratio * min(width, height):
        raise ImageRefused(
            f"it has {width} x {height} pixels; the longer side may be at most {limits.max_ratio:g} times the shorter"
        )
    return width * height


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # what is wrong with EXIF says nothing of the pixels
        return 1
    return value if isinstance(value, int) else 1


def _rgb(strip: Image.Image) -> Image.Image:
    """Over white, where it is transparent."""
    if strip.mode in _HIGH_BYTE:
        high = strip.tobytes()[_HIGH_BYTE[strip.mode] :: 2]
        strip = Image.frombytes("L", strip.size, high)
    if strip.mode not in _ALPHA and "transparency" not in strip.info:
        return strip.convert("RGB")
    layered = strip.convert("RGBA")
    white = Image.new("RGB", strip.size, (255, 255, 255))
    white.paste(layered, mask=layered.getchannel("A"))
    return white
