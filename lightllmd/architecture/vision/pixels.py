"""What a model's processor does to the pixels of an image, read out of its preprocessor_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightllmd.architecture.entries import invalid, not_built
from lightllmd.errors import show

# pillow's numbers of its filters: nearest, lanczos, bilinear, bicubic, box, hamming.
RESAMPLING = range(6)
LANCZOS, BILINEAR, BICUBIC = 1, 2, 3
MOST_SIDE = 1 << 14  # pixels
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PixelNorm:
    """``(byte * rescale - mean) / std``, by channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float = 1 / 255

    @property
    def background(self) -> tuple[int, int, int]:
        """The colour of what is padded: the mean, in bytes."""
        red, green, blue = (min(255, max(0, int(mean * 255))) for mean in self.mean)
        return red, green, blue


@dataclass(frozen=True)
class Resizing:
    """To `height` x `width`, or, where `shortest` is given, so that the shorter side has as many pixels; of that the
    middle of `crop` (height, width) where there is one."""

    height: int = 0
    width: int = 0
    shortest: int = 0
    crop: tuple[int, int] | None = None
    resample: int = BICUBIC
    padded: bool = False  # made square before, with the mean of all pixels around it

    @property
    def result(self) -> tuple[int, int] | None:
        """(height, width) of what it makes; None: they depend on the image."""
        if self.crop is not None:
            return self.crop
        if self.padded and self.shortest:
            return self.shortest, self.shortest
        return None if self.shortest else (self.height, self.width)


def pixel_norm(settings: Mapping[str, Any], usual: PixelNorm) -> PixelNorm:
    """Raises ConfigInvalid naming the key."""
    if _switch(settings, "do_normalize", True):
        mean, std = _channels(settings, "image_mean", usual.mean), _channels(settings, "image_std", usual.std)
    else:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if any(value <= 0 for value in std):
        raise invalid(f"image_std is {show(list(std))}, positive numbers are needed")
    rescale = settings.get("rescale_factor", usual.rescale)
    if isinstance(rescale, bool) or not isinstance(rescale, int | float) or not 0 < rescale <= 1:
        raise invalid(f"rescale_factor is {show(rescale)}, a number above 0 and at most 1 is needed")
    return PixelNorm(mean, std, float(rescale) if _switch(settings, "do_rescale", True) else 1.0)


def resizing(settings: Mapping[str, Any], usual: Resizing) -> Resizing:
    """As the image processors of CLIP and SigLIP read their settings; `usual`: where they say nothing. Raises
    ConfigInvalid."""
    if not _switch(settings, "do_resize", True):
        raise not_built("do_resize = false of an image processor is not available yet")
    size = settings.get("size")
    height, width, shortest = usual.height, usual.width, usual.shortest
    if isinstance(size, int) and not isinstance(size, bool):  # as CLIP's settings of 2022 have it
        height, width, shortest = 0, 0, side("size", size)
    elif isinstance(size, Mapping) and "shortest_edge" in size:
        if size.get("longest_edge") is not None:
            raise not_built("size.longest_edge of an image processor is not available yet")
        height, width, shortest = 0, 0, side("size.shortest_edge", size["shortest_edge"])
    elif size is not None:
        height, width = height_width("size", size)
        shortest = 0
    crop = usual.crop
    if settings.get("crop_size") is not None:
        crop = height_width("crop_size", settings["crop_size"])
    if not _switch(settings, "do_center_crop", usual.crop is not None):
        crop = None
    elif crop is None:
        raise invalid("do_center_crop is true, but there is no crop_size")
    return Resizing(
        height, width, shortest, crop, resample(settings, usual.resample), _switch(settings, "do_pad", usual.padded)
    )


def resample(settings: Mapping[str, Any], usual: int) -> int:
    """Pillow's number of the filter. Raises ConfigInvalid."""
    value = settings.get("resample", usual)
    if isinstance(value, bool) or not isinstance(value, int) or value not in RESAMPLING:
        raise invalid(f"resample is {show(value)}, an integer from 0 to {RESAMPLING[-1]} is needed")
    return value


def height_width(key: str, value: Any) -> tuple[int, int]:
    """Of a number, or an object of both. Raises ConfigInvalid."""
    if isinstance(value, Mapping) and {"height", "width"} <= value.keys():
        return side(f"{key}.height", value["height"]), side(f"{key}.width", value["width"])
    if isinstance(value, Mapping):
        raise invalid(f"{key} is {show(dict(value))}, height and width are needed")
    return side(key, value), side(key, value)


def side(key: str, value: Any) -> int:
    """Pixels. Raises ConfigInvalid."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_SIDE:
        raise invalid(f"{key} is {show(value)}, an integer from 1 to {MOST_SIDE} is needed")
    return value


def _switch(settings: Mapping[str, Any], key: str, usual: bool) -> bool:
    value = settings.get(key)
    value = usual if value is None else value
    if not isinstance(value, bool):
        raise invalid(f"{key} is {show(value)}, true or false is needed")
    return value


def _channels(settings: Mapping[str, Any], key: str, usual: tuple[float, float, float]) -> tuple[float, float, float]:
    value = settings.get(key)
    if value is None:
        return usual
    numbers = [value] * 3 if isinstance(value, int | float) else value
    real = isinstance(numbers, list | tuple) and len(numbers) == 3
    if not real or not all(isinstance(one, int | float) and abs(one) < 1e6 for one in numbers):
        raise invalid(f"{key} is {show(value)}, three numbers are needed")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])
