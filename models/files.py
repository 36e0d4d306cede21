"""Files that anyone may have written: opened only if they are files, and named where they are damaged."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# More than any JSON file of a checkpoint holds, and little enough to be read.
MOST_JSON = 1 << 28


def damaged(what: str, kind: type[Exception] = ValueError) -> Exception:
    """The error for a file that has to come anew; `what` names it and says what is wrong."""
    return kind(f"{what}: fetch the file again (`hf download`; in a git clone, `git lfs pull`)")


def is_there(path: Path) -> bool:
    """Whether there is such a file.

    Raises:
        ValueError: there is something else of this name, such as a folder or a pipe (which would never end).
    """
    if path.is_file():
        return True
    if path.exists():
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}: put the file in its place")
    if path.is_symlink():
        raise damaged(f"{path} is a link to a file that does not exist")
    return False


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold one JSON object in UTF-8, whose names differ.
        OSError: it cannot be read.
    """
    if not is_there(path):
        raise FileNotFoundError(f"{path} is missing: pass a folder that holds it")
    if path.stat().st_size > MOST_JSON:
        raise damaged(f"{path} has {path.stat().st_size} bytes, too many for a JSON file of a checkpoint")
    return parsed(path, path.read_bytes())


def read_text(path: Path) -> str:
    """A text file in UTF-8.

    Raises:
        ValueError: it is not in UTF-8.
        OSError: it cannot be read.
    """
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(f"{path} is not text in UTF-8 ({error})") from error


def parsed(path: Path, content: bytes) -> dict[str, Any]:
    """The object in JSON text that comes from `path`; raises ValueError as `read_json`."""
    try:
        # Editors of Windows put a mark in front, which means nothing in UTF-8.
        found = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise damaged(f"{path} is not valid JSON ({reason})") from error
    if not isinstance(found, dict):
        raise damaged(f"{path} holds a JSON {type(found).__name__}, not an object")
    return found


def some(names: Iterable[str], most: int = 4) -> str:
    """The first few of many names, for a message."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands there twice")
        found[name] = value
    return found
