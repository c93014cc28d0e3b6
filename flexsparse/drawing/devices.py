"""Peak rates of accelerators, from their makers' data sheets."""

from __future__ import annotations

from typing import NamedTuple

from flexsparse.errors import MaskError


class Device(NamedTuple):
    """What a device can do at most: dense bfloat16 FLOP/s, and bytes/s of its memory."""

    name: str
    flops: float
    memory: float


# NVIDIA's sheets give tensor-core rates with 2:4 sparsity from the H100 on; dense is half of that.
DEVICES = (
    Device("A100", 312e12, 2.039e12),  # A100 80GB SXM: "NVIDIA A100 Tensor Core GPU" data sheet
    Device("H100", 989e12, 3.35e12),  # H100 SXM: "NVIDIA H100 Tensor Core GPU" data sheet
    Device("H200", 989e12, 4.8e12),  # H200 SXM: "NVIDIA H200 Tensor Core GPU" data sheet
    Device("B200", 2250e12, 8.0e12),  # HGX B200, for each GPU: "NVIDIA Blackwell" data sheet
    Device("L40S", 362e12, 0.864e12),  # "NVIDIA L40S GPU" data sheet
    Device("MI300X", 1307e12, 5.3e12),  # "AMD Instinct MI300X Accelerator" data sheet
)


def device_of(device: str | Device) -> Device:
    """The device of a name, or the device itself."""
    if isinstance(device, Device):
        return device
    for known in DEVICES:
        if isinstance(device, str) and device.upper() == known.name:
            return known
    names = ", ".join(known.name for known in DEVICES)
    raise MaskError(
        f"roofline: device={device!r}; the peaks of {names} are known. Give those of another as "
        "flexsparse.drawing.Device(name, flops, memory)."
    )
