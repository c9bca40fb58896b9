"""Which device a model is to run on, and what it is like."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import msgspec

from lightllmd.config.plan import Device, DeviceFacts
from lightllmd.errors import NoUsableDevice
from lightllmd.probe import cuda_driver
from lightllmd.probe.gpus import gpus
from lightllmd.weights.device_facts import cpu_facts, free_memory, usable_cores


def device_facts(wanted: str, threads: int, quick: bool = False) -> DeviceFacts:
    """`wanted` is "auto", "cpu" or "cuda"; `threads` 0 means the physical cores. `quick`: only memory is wanted, for
    which the CUDA driver need not be started. Raises NoUsableDevice."""
    threads = threads or usable_cores()
    if wanted == "cpu":
        return cpu_facts(threads)
    try:
        return _cuda_facts(threads, quick)
    except NoUsableDevice as none:
        if wanted == "cuda":
            raise
        return msgspec.structs.replace(cpu_facts(threads), no_gpu=none.message)


def _cuda_facts(threads: int, quick: bool) -> DeviceFacts:
    if torch_cuda_version() is None:
        raise NoUsableDevice("the installed torch is a CPU build")
    try:
        import pynvml
    except ImportError:
        raise NoUsableDevice("no GPU can be asked for: nvidia-ml-py is not installed") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NoUsableDevice(f"no NVIDIA driver: {error}") from None
    # NVML numbers GPUs by where they are plugged in; CUDA does where it is told to, as the daemon tells its children.
    alike = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    open_devices = None if quick and alike else cuda_driver.open_devices
    try:
        found, visible = gpus(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"), open_devices)
    except pynvml.NVMLError as error:
        raise NoUsableDevice(f"the GPUs can't be asked: {error}") from None
    finally:
        pynvml.nvmlShutdown()
    return facts_of(found, threads, visible)


def facts_of(devices: list[Device], threads: int, visible: str = "") -> DeviceFacts:
    """Of a host with these GPUs. Raises NoUsableDevice."""
    usable = [device for device in devices if not device.fault]
    if not usable:
        faults = "; ".join(f"{device.title}: {device.fault}" for device in devices)
        raise NoUsableDevice(f"no GPU can be used: {faults}" if faults else "no GPU is visible (CUDA_VISIBLE_DEVICES)")
    first = usable[0]
    return DeviceFacts(
        kind="cuda",
        name=first.name,
        count=len(usable),
        memory_total=first.memory_total,
        memory_free=first.memory_free,
        fast_dtypes=first.fast_dtypes,
        cpu_threads=threads,
        capability=first.capability,
        devices=devices,
        visible=visible,
        host_free=free_memory(),
    )


def torch_cuda_version() -> str | None:
    """The CUDA version that the installed torch was built for, read from its version.py; None for a CPU build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        text = Path(spec.submodule_search_locations[0], "version.py").read_text()
    except OSError:
        return None
    match = re.search(r"^cuda[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None
