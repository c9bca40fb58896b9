"""What the CUDA driver lets a process of ours use: asked through its C interface, which makes no context on any GPU."""

from __future__ import annotations

import ctypes
import uuid

LIBRARY = "libcuda.so.1"


class DriverFault(Exception):
    """CUDA can't be used at all, and why."""


def open_devices() -> list[str]:
    """UUIDs without their prefix, in the order in which CUDA numbers the devices. It heeds CUDA_VISIBLE_DEVICES and
    CUDA_DEVICE_ORDER; of MIG instances it opens one. Raises DriverFault."""
    try:
        cuda = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise DriverFault(str(error)) from None
    _call(cuda, "cuInit", 0)
    count = ctypes.c_int()
    _call(cuda, "cuDeviceGetCount", ctypes.byref(count))
    return [_uuid(cuda, index) for index in range(count.value)]


def _uuid(cuda: ctypes.CDLL, index: int) -> str:
    device, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    _call(cuda, "cuDeviceGet", ctypes.byref(device), index)
    _call(cuda, "cuDeviceGetUuid_v2", ctypes.byref(raw), device)  # of a MIG instance its own, not its GPU's
    return str(uuid.UUID(bytes=bytes(raw)))


def _call(cuda: ctypes.CDLL, name: str, *arguments: object) -> None:
    code = getattr(cuda, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        cuda.cuGetErrorName(code, ctypes.byref(text))
        raise DriverFault(f"{name}: {text.value.decode() if text.value else f'error {code}'}")
