"""A checkpoint folder: its configuration, and what its safetensors headers say, before any tensor is read."""

from pathlib import Path, PureWindowsPath
from typing import Any

from dkv.models.files import damaged, is_there, read_json, some
from dkv.models.foreign import adapter_advice
from dkv.models.headers import Entry, read_header

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
# What may lie there instead of weights, and what to do.
INSTEAD = {
    ("adapter_model*",): f", the weights of an adapter, but no {WEIGHTS}: merge the adapter into its base model "
    "(peft: merge_and_unload, save_pretrained), and load that",
    ("*.bin", "*.pt", "*.pth"): f" but no {WEIGHTS}, and pickles are not read: convert the checkpoint (load it with "
    "transformers and call save_pretrained, which writes safetensors)",
}


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


def _adapter(folder: Path) -> ValueError:
    config = read_json(folder / ADAPTER)
    kind, base = str(config.get("peft_type") or "trained"), config.get("base_model_name_or_path")
    return ValueError(
        f"{folder} holds a {kind} adapter ({ADAPTER}{f' of {base}' if base else ''}), not a model of its own: "
        f"{adapter_advice(kind)}"
    )


def _no_weights(folder: Path) -> FileNotFoundError:
    for patterns, what in INSTEAD.items():
        if found := sorted(path.name for pattern in patterns for path in folder.glob(pattern)):
            return FileNotFoundError(f"{folder} has {some(found)}{what}")
    return FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}: pass the folder that holds the weights")
