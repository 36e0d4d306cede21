"""Files that anyone may have written: opened only if they are files, checked before use, and named where damaged."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# More than any JSON file of a checkpoint holds, and little enough to be read.
MOST_JSON = 1 << 28
# The longest header of a safetensors file, as in its library.
MOST_HEADER = 100_000_000
# Bits of a number -> the codes of safetensors for its kinds.
CODES = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E8M0 F8_E4M3 F8_E5M2 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "U16 I16 F16 BF16",
    32: "U32 I32 F32",
    64: "U64 I64 F64 C64",
}
BITS = {code: bits for bits, codes in CODES.items() for code in codes.split()}


@dataclass(frozen=True)
class Entry:
    """A tensor as the header of a file describes it; `dtype` is safetensors' code, such as BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    # First byte and the one after the last, counted from the end of the header.
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return self.stop - self.start


def damaged(what: str, kind: type[Exception] = ValueError) -> Exception:
    """The error for a file that has to come anew; `what` names it and says what is wrong."""
    return kind(f"{what}: fetch the file again (`hf download`; in a git clone, `git lfs pull`)")


def some(names: Iterable[str], most: int = 4) -> str:
    """The first few of many names, for a message."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def is_there(path: Path) -> bool:
    """Whether there is such a file; ValueError: it is something else, such as a folder or a pipe (which never ends)."""
    if path.is_file():
        return True
    if path.exists():
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}: put the file in its place")
    if path.is_symlink():
        raise damaged(f"{path} is a link to a file that does not exist")
    return False


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; OSError: it is missing or cannot be read, ValueError: it is no object, or damaged."""
    if not is_there(path):
        raise FileNotFoundError(f"{path} is missing: pass a folder that holds it")
    if path.stat().st_size > MOST_JSON:
        raise damaged(f"{path} has {path.stat().st_size} bytes, too many for a JSON file of a checkpoint")
    return _parsed(path, path.read_bytes())


def read_text(path: Path) -> str:
    """A text file; ValueError: it is not in UTF-8."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(f"{path} is not text in UTF-8 ({error})") from error


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name, none of which is read: 8 bytes with the header's length, then JSON.

    Raises ValueError if the file is truncated, or its header is malformed or does not describe its bytes.
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
        table = _parsed(path, content)
    except ValueError as error:
        raise damaged(f"{path} is not a safetensors file (its header cannot be read)") from error
    table.pop("__metadata__", None)
    entries = {name: _entry(path, name, described) for name, described in table.items()}
    room, end = size - 8 - length, max((entry.stop for entry in entries.values()), default=0)
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
    return entries


def _entry(path: Path, name: str, described: Any) -> Entry:
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


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    try:
        # Editors of Windows put a mark in front, which means nothing in UTF-8.
        found = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise damaged(f"{path} is not valid JSON ({reason})") from error
    if not isinstance(found, dict):
        raise damaged(f"{path} holds a JSON {type(found).__name__}, not an object")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands there twice")
        found[name] = value
    return found
