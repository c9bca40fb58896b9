"""The GPUs of a host: NVML (NVIDIA's management library) names them and measures their memory; which of them a process
can use, and by which number, the CUDA driver says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from lightllmd.config.plan import Device
from lightllmd.probe.cuda_driver import DriverFault

NO_INDEX = -1  # of a device that CUDA doesn't number


OpenDevices = Callable[[str | None], list[str]]  # as `cuda_driver.open_devices`


def gpus(nvml: Any, visible: str | None, open_devices: OpenDevices | None) -> tuple[list[Device], str]:
    """Those that `visible` (CUDA_VISIBLE_DEVICES) leaves; what can't be used has a `fault`. And `DeviceFacts.visible`.

    `nvml` is pynvml, initialised, or what stands in for it. Without `open_devices` the driver isn't asked, and numbers
    them as NVML does. Raises nvml.NVMLError where it can't tell how many there are.
    """
    listed = [_listed(nvml, number) for number in range(nvml.nvmlDeviceGetCount())]
    left = _left(listed, visible)
    return (_numbered(left), "") if open_devices is None else _opened(left, open_devices)


def _listed(nvml: Any, number: int) -> list[Device]:
    """One GPU, or its MIG instances (multi-instance GPU) where it is in that mode."""
    lost = Device(NO_INDEX, f"GPU {number}", 0, 0)
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
        lost = msgspec.structs.replace(lost, bus_id=_text(nvml.nvmlDeviceGetPciInfo(handle).busId))
        instances = _instances(nvml, handle)
        if instances is not None:
            return [_device(nvml, instance, lost.bus_id, handle, mig=True) for instance in instances]
        return [_device(nvml, handle, lost.bus_id, handle)]
    except nvml.NVMLError as error:
        return [msgspec.structs.replace(lost, fault=f"NVML: {error}")]


def _device(nvml: Any, handle: Any, bus_id: str, gpu: Any, mig: bool = False) -> Device:
    """`gpu`: the handle of the GPU that it is, or is a part of."""
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(gpu)
    return Device(
        index=NO_INDEX,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        memory_total=int(memory.total),
        memory_free=int(memory.free),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        bus_id=bus_id,
        capability=(major, minor),
        fast_dtypes=cuda_fast_dtypes((major, minor)),
        mig=mig,
    )


def cuda_fast_dtypes(capability: tuple[int, ...]) -> list[str]:
    """The dtypes that a GPU of this compute capability multiplies at full speed, best first."""
    return ["bfloat16", "float16", "float32"] if capability >= (8, 0) else ["float16", "float32"]


def _instances(nvml: Any, handle: Any) -> list[Any] | None:
    """Handles of the MIG instances; None where the GPU isn't cut into any."""
    try:
        mode, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:  # a GPU that has no such mode
        return None
    if not mode:
        return None
    found = []
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number))
        except nvml.NVMLError:  # a place that no instance takes
            continue
    return found


def _left(listed: list[list[Device]], visible: str | None) -> list[Device]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in its order: GPUs by number, GPUs and MIG instances by the beginning of
    their UUID. As CUDA does, it ends at the first entry that names none, or one once more."""
    every = [device for of_one in listed for device in of_one]
    if visible is None:
        return every
    found: list[Device] = []
    for entry in map(str.strip, visible.split(",")):
        if entry.isdecimal() and entry.isascii():
            named = listed[int(entry)][:1] if int(entry) < len(listed) else []
        elif entry.startswith(("GPU-", "MIG-")):
            named = [device for device in every if device.uuid.startswith(entry)]
        else:
            break
        if len(named) != 1 or named[0] in found:
            break
        found += named
    return found


def _numbered(devices: list[Device]) -> list[Device]:
    numbers = iter(range(len(devices)))
    replace = msgspec.structs.replace
    return [device if device.fault else replace(device, index=next(numbers)) for device in devices]


def _opened(devices: list[Device], open_devices: OpenDevices) -> tuple[list[Device], str]:
    """With CUDA's numbers, in their order, and those that it doesn't open behind them. Where the driver does not start
    because of a GPU that NVML can't ask, it may for processes that don't see that one."""
    visible, good = "", [device.uuid for device in devices if not device.fault]
    try:
        try:
            uuids = open_devices(None)
        except DriverFault:
            if len(good) in (0, len(devices)):
                raise
            visible = ",".join(good)
            uuids = open_devices(visible)
    except DriverFault as fault:
        return [_refused(device, f"CUDA can't be used: {fault}") for device in devices], ""
    numbers = {uuid: number for number, uuid in enumerate(uuids)}
    found = []
    for device in devices:
        number = numbers.get(device.uuid.partition("-")[2])
        if number is not None:
            found.append(msgspec.structs.replace(device, index=number, fault=""))
        elif device.mig:
            found.append(_refused(device, "CUDA opens one MIG instance in a process, and not this one"))
        else:
            found.append(_refused(device, "NVML lists it, CUDA can't open it"))
    return sorted(found, key=lambda device: device.index if device.index != NO_INDEX else len(found)), visible


def _refused(device: Device, fault: str) -> Device:
    return msgspec.structs.replace(device, fault=device.fault or fault)


def _text(said: str | bytes) -> str:
    return said.decode(errors="replace") if isinstance(said, bytes) else said
