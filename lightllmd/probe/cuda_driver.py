"""What the CUDA driver lets a process of ours use: asked through its C interface, which makes no context on any GPU."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import uuid

LIBRARY = "libcuda.so.1"


class DriverFault(Exception):
    """CUDA can't be used at all, and why."""


PATIENCE = 30.0  # seconds, for a driver that takes its time to start


def open_devices(visible: str | None = None) -> list[str]:
    """UUIDs without their prefix, in the order in which CUDA numbers the devices. It heeds CUDA_VISIBLE_DEVICES and
    CUDA_DEVICE_ORDER; of MIG instances it opens one. `visible`: as a process finds them that has this for
    CUDA_VISIBLE_DEVICES; a driver that did not start in this process is not asked again. Raises DriverFault."""
    if visible is not None:
        return _asked_elsewhere(visible)
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


def _asked_elsewhere(visible: str) -> list[str]:
    command, environment = [sys.executable, "-m", __name__], {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as fault:
        raise DriverFault(f"a process that sees {visible} alone: {fault}") from None
    if done.returncode:
        raise DriverFault("".join(done.stderr.strip().splitlines()[-1:]))
    return [str(uuid) for uuid in json.loads(done.stdout)]


if __name__ == "__main__":
    try:
        print(json.dumps(open_devices()))
    except DriverFault as fault:
        sys.exit(str(fault))
