"""The machine, versions, date and command behind a figure, and how fast the machine can be."""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from dkv.version import versions


def _output(*command: str) -> str:
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return ""


def _driver() -> str:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
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
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": command, **versions(),
        "device": str(device), "processor": _processor(), "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        known |= {
            "cuda": torch.version.cuda, "hip": torch.version.hip, "card": card.name,
            "arch": getattr(card, "gcnArchName", "") if torch.version.hip else f"sm_{card.major}{card.minor}",
            "processors": card.multi_processor_count, "memory_gb": round(card.total_memory / 1e9, 1),
            "driver": _driver(), "cards": torch.cuda.device_count(),
        }  # fmt: skip
    return known
