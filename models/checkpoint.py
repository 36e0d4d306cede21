"""A checkpoint folder: its configuration, and what its safetensors headers say, before any tensor is read."""

from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from dkv.models.files import FETCH, is_there, read_json, some
from dkv.models.foreign import adapter_advice
from dkv.models.headers import Entry, read_header

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`, its missing token ids filled in from `generation_config.json` if that exists.

    Raises:
        FileNotFoundError, ValueError: as `read_json`; or the folder holds an adapter, or quantised weights.
    """
    if is_there(folder / ADAPTER):
        raise _adapter(folder)
    config = read_json(folder / CONFIG)
    if config.get("quantization_config") is not None:
        raise ValueError(
            f"{folder / CONFIG} has a quantization_config, and quantised checkpoints are not read: "
            "load the original weights with pack=False (or call dkv.unpack(model)), and quantise that model"
        )
    beside = folder / "generation_config.json"
    if is_there(beside):
        for field, found in read_json(beside).items():
            if field in ("mask_token_id", "eos_token_id", "pad_token_id") and config.get(field) is None:
                config[field] = found
    return config


def read_headers(folder: Path) -> dict[str, Entry]:
    """Name, place, dtype and shape of every tensor of a folder, sharded or not. Reads no tensor.

    Raises:
        FileNotFoundError: no safetensors file, or a shard that the index names is missing.
        ValueError: a file is truncated or malformed; a shard lies outside the folder, or lacks a tensor that the
            index puts there.
    """
    if is_there(folder / WEIGHTS):
        return read_header(folder / WEIGHTS)
    if not is_there(folder / INDEX):
        raise _no_weights(folder)
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map from tensors to files: {FETCH}")
    names = sorted(set(places.values()))
    if outside := [name for name in names if _leads_out(name)]:
        raise ValueError(f"{folder / INDEX} names files outside its folder ({some(outside)}): {FETCH}")
    missing = [name for name in names if not is_there(folder / name)]
    if missing:
        raise FileNotFoundError(f"{folder} lacks shards that {INDEX} lists ({some(missing)}): {FETCH}")
    headers = {name: read_header(folder / name) for name in names}
    lost = [f"{tensor} in {shard}" for tensor, shard in places.items() if tensor not in headers[shard]]
    if lost:
        raise ValueError(f"{folder / INDEX} promises tensors that the shards lack ({some(lost)}): {FETCH}")
    found = {name: entry for header in headers.values() for name, entry in header.items()}
    return found | {tensor: headers[shard][tensor] for tensor, shard in places.items()}


def _leads_out(name: str) -> bool:
    """Whether a path leaves the folder that it starts in. Links inside may: caches of the hub consist of them."""
    return any(kind(name).is_absolute() or ".." in kind(name).parts for kind in (PurePath, PureWindowsPath))


def _adapter(folder: Path) -> ValueError:
    config = read_json(folder / ADAPTER)
    kind, base = str(config.get("peft_type") or "trained"), config.get("base_model_name_or_path")
    return ValueError(
        f"{folder} holds a {kind} adapter ({ADAPTER}{f' of {base}' if base else ''}), not a model of its own: "
        f"{adapter_advice(kind)}"
    )


def _no_weights(folder: Path) -> FileNotFoundError:
    if adapters := sorted(p.name for p in folder.glob("adapter_model*")):
        return FileNotFoundError(
            f"{folder} has {some(adapters)}, the weights of an adapter, but no {WEIGHTS}: merge the adapter into its "
            "base model (peft: merge_and_unload, save_pretrained), and load that"
        )
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        return FileNotFoundError(
            f"{folder} has {some(pickles)} but no {WEIGHTS}, and pickles are not read: convert the checkpoint "
            "(load it with transformers and call save_pretrained, which writes safetensors)"
        )
    return FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}: pass the folder that holds the weights")
