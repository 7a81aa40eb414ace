"""Memory and speed of devices, from data sheets and published measurements."""

import time
from dataclasses import dataclass

import torch

_GIB = 2**30
CONTEXT_GIB = 1.0
"""CUDA context, library workspaces and fragmentation on a GPU, in GiB."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator, or the CPU."""

    name: str
    memory_gib: float | None
    """None if the limit is not known."""
    peak_tflops: dict[str, float]
    """Dense peak according to the data sheet, in TFLOP/s by type."""
    efficiency: float = 0.40
    """Share of the peak that a diffusion U-Net reaches in eager torch with fused attention."""

    def rate(self, dtype: str) -> float:
        """Return the expected floating-point operations per second."""
        return 1e12 * self.efficiency * self.peak_tflops.get(dtype, self.peak_tflops["float32"])


# Peaks are dense, without sparsity, from the vendors' data sheets. Efficiency: diffusers' own SDXL measurement on an
# A100 (bfloat16, fused attention, eager: 3.31 s for 30 guided steps and a decode) is 40 % of the peak; compiled it is
# 53 %, and the best MLPerf entries on H100 and H200 reach about 60 %. float32 rates are without tensor cores.
DEVICES: dict[str, Device] = {
    "h200": Device(name="h200", memory_gib=139.8, peak_tflops={"bfloat16": 989, "float16": 989, "float32": 67}),
    "h100": Device(name="h100", memory_gib=79.1, peak_tflops={"bfloat16": 989, "float16": 989, "float32": 67}),
    "a100-80": Device(name="a100-80", memory_gib=79.2, peak_tflops={"bfloat16": 312, "float16": 312, "float32": 19.5}),
    "a100-40": Device(name="a100-40", memory_gib=39.4, peak_tflops={"bfloat16": 312, "float16": 312, "float32": 19.5}),
    "l40s": Device(name="l40s", memory_gib=44.4, peak_tflops={"bfloat16": 362, "float16": 362, "float32": 91.6}),
    "rtx4090": Device(name="rtx4090", memory_gib=23.6, peak_tflops={"bfloat16": 165, "float16": 165, "float32": 82.6}),
}


def device_for(name: str, *, wants_gpu: bool) -> Device:
    """Return a device by name.

    Args:
        name: a key of `DEVICES`, `cpu`, or `auto`: the GPU of this machine, else an H200 if the run uses GPUs, else
            the CPU.
        wants_gpu: whether the run uses GPUs.

    Returns:
        The device.

    Raises:
        KeyError: the device is unknown.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return _this_gpu()
        name = "h200" if wants_gpu else "cpu"
    return _this_processor() if name == "cpu" else DEVICES[name]


def _this_gpu() -> Device:
    facts = torch.cuda.get_device_properties(0)
    label = facts.name.lower().replace(" ", "")
    known = next((device for key, device in DEVICES.items() if key.replace("-", "") in label), DEVICES["a100-80"])
    return Device(
        name=facts.name, memory_gib=facts.total_memory / _GIB, peak_tflops=known.peak_tflops,
        efficiency=known.efficiency,
    )  # fmt: skip


def _this_processor() -> Device:
    """Time a matrix product on one thread of this machine; small networks reach about a third of that rate."""
    size = 512
    left, right = torch.ones(size, size), torch.ones(size, size)
    torch.mm(left, right)
    spent, rounds = 0.0, 0
    while spent < 0.05:
        started = time.perf_counter()
        torch.mm(left, right)
        spent, rounds = spent + time.perf_counter() - started, rounds + 1
    peak = 2 * size**3 * rounds / spent / 1e12
    return Device(name="cpu", memory_gib=None, peak_tflops={"float32": peak, "bfloat16": peak}, efficiency=0.3)
