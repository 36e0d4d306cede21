"""How fast a machine is: bytes per second of a copy, and FLOP/s of a matrix product."""

import statistics
import time
from collections.abc import Callable

import torch

# Too large for any cache, and matrices large enough to keep every core busy.
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
SIDE = {"cpu": 2048, "cuda": 8192}
SECONDS, FEWEST = 0.4, 5
# Seconds that one product may take: a CPU without instructions for half precision is a hundred times as slow in it.
PATIENCE = 1.0


def median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median of the calls that fit in `SECONDS`, and at least `FEWEST`, after one that does not count."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    found, end = [], time.perf_counter() + SECONDS
    while len(found) < FEWEST or time.perf_counter() < end:
        found.append(once())
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
    side = SIDE[device.type] // 4
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = median_seconds(lambda: a @ b, device)
    # Four times the side is 64 times the work.
    if 64 * seconds <= PATIENCE or device.type == "cuda":
        side *= 4
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = median_seconds(lambda: a @ b, device)
    return 2 * side**3 / seconds
