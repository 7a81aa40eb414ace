"""Check the machine: processors, memory, limits, devices, and computation and communication with torch."""

import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from acpo_dist.preflight.doctor.finding import Finding, in_child, judged

_GIB = 2**30
_OPEN_FILES = 8192
_SHARED_GIB = 2.0
_FREE_GIB = 4
_BFLOAT16_ERROR = 0.05
_DEVICES = """
import json, torch
found = []
for index in range(torch.cuda.device_count()):
    device = torch.device("cuda", index)
    free, whole = torch.cuda.mem_get_info(device)
    left = torch.linspace(-1, 1, 256 * 256, device=device).reshape(256, 256)
    narrow = (left.bfloat16() @ left.bfloat16().T).float()
    error = float((narrow - left @ left.T).abs().max() / (left @ left.T).abs().max())
    found.append({"name": torch.cuda.get_device_name(index), "free": free, "whole": whole, "error": error})
print(json.dumps({"build": torch.version.cuda, "devices": found}))
"""
_GROUP = """
import socket, torch, torch.distributed as dist
# gloo itself falls back to the loopback address, where other machines do not find it.
socket.getaddrinfo(socket.gethostname(), None)
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
value = torch.ones(1)
dist.all_reduce(value)
print(float(value))
dist.destroy_process_group()
"""


def check_system() -> Iterator[Finding]:
    """Check Python, processors, memory and limits."""
    yield judged(
        (3, 11) <= sys.version_info[:2] < (3, 14), "python", f"{platform.python_version()} on {platform.platform()}",
        "Python 3.11, 3.12 or 3.13 is needed.", otherwise="failed",
    )  # fmt: skip
    # Not all systems report which cores a process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = int(os.environ.get("OMP_NUM_THREADS") or 1)
    yield judged(
        threads <= cores, "processors", f"{cores} cores, {threads} threads per process",
        "Threads that share a core are many times slower: set OMP_NUM_THREADS=1.",
    )  # fmt: skip
    limit, free = _memory()
    yield judged(
        free > _FREE_GIB * _GIB, "memory", f"{free / _GIB:.1f} of {limit / _GIB:.1f} GiB free",
        f"The toy needs about {_FREE_GIB} GiB on Ray; close other programs.",
    )  # fmt: skip
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield judged(
        files >= _OPEN_FILES, "open files", f"at most {files} per process",
        "Ray opens many files: run `ulimit -n 65536` before it starts.",
    )  # fmt: skip
    shared = shutil.disk_usage("/dev/shm").free / _GIB if Path("/dev/shm").is_dir() else 0.0
    yield judged(
        shared >= _SHARED_GIB, "shared memory", f"{shared:.1f} GiB free in /dev/shm",
        "Ray then keeps tensors on disk, which is slow; start a container with --shm-size=8g.",
    )  # fmt: skip
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    yield judged(
        compiler is not None, "compiler", compiler or "no C++ compiler",
        "torch.compile and learner.offload_optimizer=cpu need one.", otherwise="note",
    )  # fmt: skip


def check_devices() -> Iterator[Finding]:
    """Check the GPUs that torch can use; each one's bfloat16 matrix product is compared with its float32 product."""
    done = in_child(_DEVICES)
    if not done.succeeded:
        yield Finding("devices", "failed", done.text, "torch cannot use the GPU: see `nvidia-smi` for its state.")
        return
    found = json.loads(done.text)
    for index, device in enumerate(found["devices"]):
        yield judged(
            device["error"] < _BFLOAT16_ERROR, f"device {index}",
            f"{device['name']}, {device['free'] / _GIB:.1f} of {device['whole'] / _GIB:.1f} GiB free, bfloat16 off by "
            f"{device['error']:.1g} of the largest value",
            "The device or its driver computes wrongly; do not train on it.", otherwise="failed",
        )  # fmt: skip
    if found["devices"]:
        return
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        build = f"is built for CUDA {found['build']}" if found["build"] else "is built without CUDA"
        yield Finding(
            "devices", "failed", f"an NVIDIA driver is installed, but torch finds no GPU; torch {build}",
            "Install the torch build for the driver (`nvidia-smi` shows its CUDA version).",
        )  # fmt: skip
    else:
        advice = "The toys and small DDPMs train without a GPU; SDXL and SD 1.x do not."
        yield Finding("devices", "note", "no GPU", advice)


def check_process_group() -> Iterator[Finding]:
    """Check that ranks can connect; gloo fails on a machine that cannot resolve its own name."""
    done = in_child(_GROUP, timeout_s=60)
    yield judged(
        done.succeeded, "process group", "gloo works" if done.succeeded else done.text,
        f"Add `{platform.node()}` to /etc/hosts, or set a network interface: GLOO_SOCKET_IFNAME=eth0.",
        otherwise="failed",
    )  # fmt: skip


def _memory() -> tuple[int, int]:
    """Return (available bytes of this process, free bytes); a container may have less than its machine."""
    memory = psutil.virtual_memory()
    whole, free = memory.total, memory.available
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (int((Path("/sys/fs/cgroup") / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):
            continue
        if most < whole:
            return most, min(free, max(0, most - now))
    return whole, free
