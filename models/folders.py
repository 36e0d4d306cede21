"""Where a checkpoint lies: with dkv, in a folder, or on the Hugging Face hub."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BUNDLED = {name: Path(__file__).parent / name for name in ("tiny", "tiny-dream")}
# What is fetched from the hub for a tokenizer and for a model: no code, and no weights in other formats.
TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors")


def folder_of(
    path_or_id: str | os.PathLike,
    files: Sequence[str] = MODEL_FILES,
    subfolder: str | None = "",
    **hub: Any,
) -> Path:
    """The local folder of a bundled name, a path or a hub id.

    Args:
        path_or_id: as for `dkv.load`.
        files: patterns of the files that are wanted from the hub.
        subfolder: the folder inside that holds the files; "" or None: the folder itself.
        hub: arguments of the hub's client.

    Raises:
        FileNotFoundError: there is no such folder, or the hub does not deliver it.
        ValueError: the path is empty or a file; or a `revision` of what is not on the hub.
        TypeError: the path or the subfolder is no path.
    """
    if not isinstance(path_or_id, str | os.PathLike) or isinstance(os.fspath(path_or_id), bytes):
        raise TypeError(f"path_or_id must be a folder, a hub id or {' or '.join(BUNDLED)}, got {path_or_id!r}")
    if not isinstance(subfolder, str | os.PathLike | None):
        raise TypeError(f"subfolder must be the name of a folder, got {subfolder!r}")
    if not os.fspath(path_or_id):
        raise ValueError("path_or_id is empty: pass a checkpoint folder ('.' for this one) or the id of a model")
    subfolder = subfolder or ""
    local = _local(path_or_id)
    if local is not None and hub.get("revision") is not None:
        raise ValueError(
            f"revision={hub['revision']!r} is for models of the hub, and {path_or_id} is here: leave it out"
        )
    if local is None:
        if subfolder:
            files = [f"{subfolder}/{pattern}" for pattern in files]
        local = _fetched(os.fspath(path_or_id), files, hub)
    if subfolder and not (local / subfolder).is_dir():
        raise FileNotFoundError(f"{path_or_id} has no folder {subfolder!r}: pass the subfolder that holds config.json")
    return local / subfolder


def _local(path_or_id: str | os.PathLike) -> Path | None:
    """The folder of a bundled name or a path; None: it is an id of the hub."""
    name = os.fspath(path_or_id)
    if isinstance(path_or_id, str) and name in BUNDLED:
        return BUNDLED[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file: pass the folder that holds it")
    if not isinstance(path_or_id, str) or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise FileNotFoundError(
            f"there is no folder {path}: pass a checkpoint folder, a hub id such as 'org/name', "
            f"or a bundled name ({', '.join(BUNDLED)})"
        )
    return None


def _fetched(name: str, files: Sequence[str], options: dict) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files), **options))
    # The hub's client raises several families of errors, its network library's among them.
    except Exception as error:
        raise FileNotFoundError(
            f"there is no folder {name}, and the hub did not deliver a model of this name ({error}): pass a local "
            f"folder, or check the name, the network and `hf auth login`, or run `hf download {name}` beforehand"
        ) from error
