"""The machine, versions, date and command behind a figure, and how fast the machine can be."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dkv.bench.timing import timed
from dkv.version import versions

# Too large for any cache, and matrices large enough to keep every core busy.
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
SIDE = {"cpu": 2048, "cuda": 8192}
SECONDS, FEWEST = 0.4, 5
# Seconds that one product may take: a CPU without instructions for half precision is a hundred times as slow in it.
PATIENCE = 1.0


def _driver() -> str:
    found, query = [], ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    for path in ("/sys/module/nvidia/version", "/sys/module/amdgpu/version"):
        with suppress(OSError):
            found.append(Path(path).read_text().strip())
    return found[0] if found else "unknown"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def warn_if_busy(program: str) -> None:
    """Say on standard error that figures will be off, where the machine has other work."""
    with suppress(OSError, AttributeError):
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        if load > cores / 2:
            busy = f"the machine is busy (load average {load:.1f} on {cores} cores): figures will be off"
            print(f"{program}: warning: {busy}", file=sys.stderr)


def facts(device: torch.device, command: str) -> dict[str, Any]:
    """Processor or card, versions, date and command of a measurement on `device`."""
    known = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        **versions(),
        "device": str(device),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        known |= {
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "card": card.name,
            "arch": getattr(card, "gcnArchName", "") if torch.version.hip else f"sm_{card.major}{card.minor}",
            "processors": card.multi_processor_count,
            "memory_gb": round(card.total_memory / 1e9, 1),
            "driver": _driver(),
            "cards": torch.cuda.device_count(),
        }
    return known


def median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median of the calls that fit in `SECONDS`, and at least `FEWEST`, after one that does not count."""
    timed(call, device)
    found, end = [], time.perf_counter() + SECONDS
    while len(found) < FEWEST or time.perf_counter() < end:
        found.append(timed(call, device)[0])
    return statistics.median(found)


@torch.no_grad()
def rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure a device, in about a second.

    Args:
        device: CPU or GPU.
        dtype: float dtype of the matrices.

    Returns:
        "copy_bytes_per_s", what a large copy reads and writes, and "matrix_flops_per_s".

    Raises:
        ValueError: `dtype` is not a float dtype.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a float dtype, got {dtype}")
    return {"copy_bytes_per_s": copy_rate(device), "matrix_flops_per_s": matrix_rate(device, dtype)}


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes."""
    size = COPY_BYTES[device.type]
    # Written once: pages that were only asked for are all the same page of zeros, which stays in the cache.
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    return 2 * size / median_seconds(lambda: target.copy_(source), device)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two large square matrices."""
    for side in (SIDE[device.type] // 4, SIDE[device.type]):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = median_seconds(partial(torch.matmul, a, b), device)
        # Four times the side is 64 times the work.
        if 64 * seconds > PATIENCE and device.type == "cpu":
            break
    return 2 * side**3 / seconds
