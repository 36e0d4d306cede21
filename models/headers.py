"""What the header of a safetensors file says of its tensors, checked against the file before any of them is read."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dkv.models.files import damaged, parsed

# As in the safetensors library.
MOST_HEADER = 100_000_000
# The codes of the format by the bits of a number, and the bits by code.
CODES = {
    4: ("F4",),
    6: ("F6_E2M3", "F6_E3M2"),
    8: ("BOOL", "U8", "I8", "F8_E8M0", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"),
    16: ("U16", "I16", "F16", "BF16"),
    32: ("U32", "I32", "F32"),
    64: ("U64", "I64", "F64", "C64"),
}
BITS = {code: bits for bits, codes in CODES.items() for code in codes}


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
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise damaged(f"{path} ({size} bytes) is truncated or not a safetensors file")
        if length > MOST_HEADER:
            raise damaged(f"{path} is not a safetensors file (a header of {length} bytes)")
        content = file.read(length)
    try:
        table = parsed(path, content)
    except ValueError as error:
        raise damaged(f"{path} is not a safetensors file (its header cannot be read)") from error
    table.pop("__metadata__", None)
    entries = {name: _entry(path, name, described) for name, described in table.items()}
    _check_places(path, entries, size - 8 - length, size)
    return entries


def _entry(path: Path, name: str, described: Any) -> Entry:
    """One tensor as the header describes it, if that makes sense."""
    described = described if isinstance(described, dict) else {}
    dtype, shape, places = (described.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _sizes(shape) and _sizes(places) and len(places) == 2):
        says = f"dtype {dtype!r}, shape {shape!r}, data_offsets {places!r}"
        raise damaged(f"{path} is not a safetensors file (its header says of {name}: {says})")
    entry = Entry(path, dtype, tuple(shape), *places)
    if dtype in BITS and (bits := math.prod(shape) * BITS[dtype]) != 8 * entry.bytes:
        needs = f"{dtype} {shape} needs {bits // 8} bytes"
        raise damaged(f"{path} is damaged: {needs}, and its header gives {name} {entry.bytes}")
    return entry


def _sizes(found: Any) -> bool:
    return isinstance(found, list) and all(type(n) is int and n >= 0 for n in found)


def _check_places(path: Path, entries: dict[str, Entry], room: int, size: int) -> None:
    """Refuse tensors that overlap, leave bytes between them, or end elsewhere than the file."""
    end = max((entry.stop for entry in entries.values()), default=0)
    if end > room:
        raise damaged(f"{path} is truncated: its header promises {size - room + end} bytes, it has {size}")
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            what = "overlaps another tensor" if entry.start < at else f"leaves {entry.start - at} bytes unused"
            raise damaged(f"{path} is damaged: {name} {what}")
        at = entry.stop
    if at != room:
        raise damaged(f"{path} is damaged: {room - at} bytes follow its last tensor")
