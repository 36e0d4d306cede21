"""A checkpoint folder: where it lies (beside dkv, on disk or on the hub), and what it says before a tensor is read."""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dkv.models.files import Entry, damaged, is_there, read_header, read_json, some
from dkv.models.foreign import adapter_advice

_NAMES = ("tiny", "tiny-dream", "tiny-block", "tiny-long", "tiny-text")
BUNDLED = {name: Path(__file__).parent / name for name in _NAMES}
# What is fetched from the hub for a tokenizer and for a model: no code, and no weights in other formats.
TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
MODEL_FILES = (*TOKENIZER_FILES, "*.safetensors")
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
# What may lie there instead of weights, and what to do.
INSTEAD = {
    ("adapter_model*",): f", the weights of an adapter, but no {WEIGHTS}: merge the adapter into its base model "
    "(peft: merge_and_unload, save_pretrained), and load that",
    ("*.bin", "*.pt", "*.pth"): f" but no {WEIGHTS}, and pickles are not read: convert the checkpoint (load it with "
    "transformers and call save_pretrained, which writes safetensors)",
}


def folder_of(
    path_or_id: str | os.PathLike, files: Sequence[str] = MODEL_FILES, subfolder: str | None = "", **hub: Any
) -> Path:
    """The local folder of a bundled name, a path or a hub id.

    Args:
        path_or_id, subfolder: as for `dkv.load`.
        files: patterns of the files that are wanted from the hub.
        hub: arguments of the hub's client.

    Raises:
        FileNotFoundError: there is no such folder, or the hub does not deliver it.
        ValueError: the path is empty or a file; or a `revision` of what is not on the hub.
        TypeError: the path or the subfolder is no path.
    """
    if not isinstance(path_or_id, str | os.PathLike) or isinstance(os.fspath(path_or_id), bytes):
        raise TypeError(f"path_or_id must be a folder, a hub id or one of {', '.join(BUNDLED)}, got {path_or_id!r}")
    if not isinstance(subfolder, str | os.PathLike | None):
        raise TypeError(f"subfolder must be the name of a folder, got {subfolder!r}")
    if not os.fspath(path_or_id):
        raise ValueError("path_or_id is empty: pass a checkpoint folder ('.' for this one) or the id of a model")
    subfolder = subfolder or ""
    folder = _local(path_or_id)
    if folder is None:
        folder = _fetched(os.fspath(path_or_id), [str(PurePosixPath(subfolder, name)) for name in files], hub)
    elif hub.get("revision") is not None:
        raise ValueError(
            f"revision={hub['revision']!r} is for models of the hub, and {path_or_id} is here: leave it out"
        )
    if subfolder and not (folder / subfolder).is_dir():
        raise FileNotFoundError(f"{path_or_id} has no folder {subfolder!r}: pass the subfolder that holds config.json")
    return folder / subfolder


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`, its missing token ids filled in from `generation_config.json` if that exists.

    All of the latter is `generation_config` in it.

    Raises as `read_json`, and ValueError if the folder holds an adapter or quantised weights.
    """
    if is_there(folder / ADAPTER):
        adapter = read_json(folder / ADAPTER)
        kind, base = str(adapter.get("peft_type") or "trained"), adapter.get("base_model_name_or_path")
        of_base = f" of {base}" if base else ""
        raise ValueError(
            f"{folder} holds a {kind} adapter ({ADAPTER}{of_base}), not a model of its own: {adapter_advice(kind)}"
        )
    config = read_json(folder / CONFIG)
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"{folder / CONFIG} has a quantization_config, and quantised checkpoints are not read: "
            "load the original weights with pack=False (or call dkv.unpack(model)), and quantise that model"
        )
    beside = folder / "generation_config.json"
    ids = read_json(beside) if is_there(beside) else {}
    for field in ("mask_token_id", "eos_token_id", "pad_token_id"):
        if config.get(field) is None and field in ids:
            config[field] = ids[field]
    return {**config, "generation_config": ids}


def read_headers(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder by name, sharded or not: its file, dtype and shape. Reads no tensor.

    Raises:
        FileNotFoundError: no safetensors file, or a shard that the index names is missing.
        ValueError: a file is truncated or malformed; a shard lies outside the folder, or lacks a tensor that the index
            puts there.
    """
    if is_there(folder / WEIGHTS):
        return read_header(folder / WEIGHTS)
    if not is_there(folder / INDEX):
        for patterns, what in INSTEAD.items():
            if found := sorted(path.name for pattern in patterns for path in folder.glob(pattern)):
                raise FileNotFoundError(f"{folder} has {some(found)}{what}")
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}: pass the folder that holds the weights")
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        raise damaged(f"{folder / INDEX} has no weight_map from tensors to files")
    names = sorted(set(places.values()))
    # Links inside may lead elsewhere: caches of the hub consist of them. A path of Windows has both kinds of slashes.
    if outside := [name for name in names if (path := PureWindowsPath(name)).anchor or ".." in path.parts]:
        raise damaged(f"{folder / INDEX} names files outside its folder ({some(outside)})")
    if missing := [name for name in names if not is_there(folder / name)]:
        raise damaged(f"{folder} lacks shards that {INDEX} lists ({some(missing)})", FileNotFoundError)
    headers = {name: read_header(folder / name) for name in names}
    if lost := [f"{tensor} in {shard}" for tensor, shard in places.items() if tensor not in headers[shard]]:
        raise damaged(f"{folder / INDEX} promises tensors that the shards lack ({some(lost)})")
    found = {name: entry for header in headers.values() for name, entry in header.items()}
    return found | {tensor: headers[shard][tensor] for tensor, shard in places.items()}


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
