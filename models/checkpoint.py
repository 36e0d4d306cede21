"""A checkpoint folder: its configuration, and what its safetensors headers say, before any tensor is read."""

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FETCH = "fetch the file again (`hf download`; in a git clone, `git lfs pull`)"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what its header says of it; `dtype` is safetensors' code, such as BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: pass a folder with {CONFIG} and {WEIGHTS}")
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): {FETCH}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object: {FETCH}")
    return content


def read_config(folder: Path) -> dict:
    """`config.json`, its missing token ids filled in from `generation_config.json` if that exists.

    Raises:
        FileNotFoundError, ValueError: as `read_json`; or the weights are quantised.
    """
    config = read_json(folder / CONFIG)
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"{folder / CONFIG} has a quantization_config, and quantised checkpoints are not read: "
            "load the original weights, and quantise the model that `load` returns"
        )
    beside = folder / "generation_config.json"
    if beside.is_file():
        for field, found in read_json(beside).items():
            if field in ("mask_token_id", "eos_token_id", "pad_token_id") and config.get(field) is None:
                config[field] = found
    return config


def read_headers(folder: Path) -> dict[str, Entry]:
    """Name, place, dtype and shape of every tensor of a folder, sharded or not. Reads no tensor.

    Raises:
        FileNotFoundError: no safetensors file, or a shard that the index names is missing.
        ValueError: a file is truncated or malformed, or a shard lacks a tensor that the index puts there.
    """
    if (folder / WEIGHTS).is_file():
        return _header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map from tensors to files: {FETCH}")
    shards = {name: folder / name for name in sorted(set(places.values()))}
    missing = [name for name, path in shards.items() if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks shards that {INDEX} lists ({some(missing)}): {FETCH}")
    headers = {name: _header(path) for name, path in shards.items()}
    lost = [f"{tensor} in {shard}" for tensor, shard in places.items() if tensor not in headers[shard]]
    if lost:
        raise ValueError(f"{folder / INDEX} promises tensors that the shards lack ({some(lost)}): {FETCH}")
    found = {name: entry for header in headers.values() for name, entry in header.items()}
    return found | {tensor: headers[shard][tensor] for tensor, shard in places.items()}


def some(names: Iterable[str], most: int = 4) -> str:
    """The first few of many names, for a message."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _header(path: Path) -> dict[str, Entry]:
    """The header of one file: 8 bytes with its length, then JSON whose offsets count from its end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise ValueError(f"{path} ({size} bytes) is truncated or not a safetensors file: {FETCH}")
        content = file.read(length)
    try:
        table = json.loads(content)
        table.pop("__metadata__", None)
        entries = {name: Entry(path, t["dtype"], tuple(t["shape"])) for name, t in table.items()}
        need = 8 + length + max((t["data_offsets"][1] for t in table.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a safetensors file (its header cannot be read): {FETCH}") from error
    if need > size:
        raise ValueError(f"{path} is truncated: its header promises {need} bytes, it has {size}: {FETCH}")
    return entries


def _no_weights(folder: Path) -> FileNotFoundError:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        return FileNotFoundError(
            f"{folder} has {some(pickles)} but no {WEIGHTS}, and pickles are not read: convert the checkpoint "
            "(load it with transformers and call save_pretrained, which writes safetensors)"
        )
    return FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}: pass the folder that holds the weights")
