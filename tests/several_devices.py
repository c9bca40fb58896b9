"""Hosts with several GPUs, as the probe tells of them."""

from __future__ import annotations

from collections.abc import Sequence

from lightllmd.config.plan import Device, DeviceFacts

GB = 10**9
FAST = ["bfloat16", "float16", "float32"]
LOST = "NVML: GPU is lost"


def gpus(*free: float, lost: Sequence[int] = (), name: str = "NVIDIA H200") -> DeviceFacts:
    """With so many GB free on each; the places in `lost` can't be used."""
    devices: list[Device] = []
    for place, amount in enumerate(free):
        usable = sum(not device.fault for device in devices)
        devices.append(
            Device(
                index=-1 if place in lost else usable,
                name=name,
                memory_total=150 * GB,
                memory_free=0 if place in lost else int(amount * GB),
                uuid=f"GPU-{place}",
                bus_id=f"00000000:{place:02X}:00.0",
                capability=(9, 0),
                fast_dtypes=FAST,
                fault=LOST if place in lost else "",
            )
        )
    first = next(device for device in devices if not device.fault)
    count = len(devices) - len(lost)
    return DeviceFacts(
        "cuda", first.name, count, first.memory_total, first.memory_free, FAST, 16, first.capability, devices
    )
