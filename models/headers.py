"""What the header of a safetensors file says of its tensors, checked against the file before any of them is read."""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dkv.models.files import FETCH, parsed

# As in the safetensors library.
MOST_HEADER = 100_000_000
# Bits of a number, by the codes of the format.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what its header says of it; `dtype` is safetensors' code, such as BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    # First byte and the one after the last, counted from the end of the header.
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return self.stop - self.start


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one file by name: 8 bytes with the header's length, then JSON.

    Raises:
        ValueError: the file is truncated, or its header is malformed or does not describe its bytes.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > size - 8:
            raise ValueError(f"{path} ({size} bytes) is truncated or not a safetensors file: {FETCH}")
        if length > MOST_HEADER:
            raise ValueError(f"{path} is not a safetensors file (a header of {length} bytes): {FETCH}")
        content = file.read(length)
    try:
        table = parsed(path, content)
    except ValueError as error:
        raise ValueError(f"{path} is not a safetensors file (its header cannot be read): {FETCH}") from error
    table.pop("__metadata__", None)
    entries = {name: _entry(path, name, described) for name, described in table.items()}
    _check_places(path, entries, size - 8 - length, size)
    return entries


def _entry(path: Path, name: str, described: Any) -> Entry:
    """One tensor as the header describes it, if that makes sense."""
    described = described if isinstance(described, dict) else {}
    dtype, shape, places = (described.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _sizes(shape) and _sizes(places) and len(places) == 2):
        raise ValueError(
            f"{path} is not a safetensors file (its header says of {name}: dtype {dtype!r}, shape {shape!r}, "
            f"data_offsets {places!r}): {FETCH}"
        )
    entry = Entry(path, dtype, tuple(shape), *places)
    bits = math.prod(shape) * BITS[dtype] if dtype in BITS else None
    if bits is not None and bits != 8 * entry.bytes:
        raise ValueError(
            f"{path} is damaged: {dtype} {list(shape)} needs {bits // 8} bytes, and its header gives {name} "
            f"{entry.bytes}: {FETCH}"
        )
    return entry


def _sizes(found: Any) -> bool:
    return isinstance(found, list) and all(type(n) is int and n >= 0 for n in found)


def _check_places(path: Path, entries: dict[str, Entry], room: int, size: int) -> None:
    """Refuse tensors that overlap, leave bytes between them, or end elsewhere than the file."""
    end = max((entry.stop for entry in entries.values()), default=0)
    if end > room:
        raise ValueError(f"{path} is truncated: its header promises {size - room + end} bytes, it has {size}: {FETCH}")
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            what = "overlaps another tensor" if entry.start < at else f"leaves {entry.start - at} bytes unused"
            raise ValueError(f"{path} is damaged: {name} {what}: {FETCH}")
        at = entry.stop
    if at != room:
        raise ValueError(f"{path} is damaged: {room - at} bytes follow its last tensor: {FETCH}")
