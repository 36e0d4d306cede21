"""Arguments of `dkv.load` and of transformers' `from_pretrained`: taken, granted, or answered."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

_QUANTISE = "pass weights='int8' or 'int4', or load with pack=False and quantise the model that you get (torchao)"
_ATTENTION = "dkv computes attention with its own kernels (dkv.use_backend): leave it out"
_ONE_DEVICE = "a model lies on one device: pass device='cuda:0', or another"
_CONVERT = "only safetensors are read: convert the checkpoint with transformers"

FLOATS = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
# Handed on to the hub's client.
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# Asks for what happens anyway, or allows what is not needed (no code of a checkpoint is run, and no pickle is read).
GRANTED = ("trust_remote_code", "code_revision", "low_cpu_mem_usage", "_fast_init", "use_cache", "weights_only")
# Those with another effect in transformers -> what to do. None and False ask for nothing and are accepted.
ANSWERS = {
    **dict.fromkeys(("load_in_8bit", "load_in_4bit", "quantization_config"), _QUANTISE),
    **dict.fromkeys(("attn_implementation", "use_flash_attention_2"), _ATTENTION),
    **dict.fromkeys(("max_memory", "offload_folder", "offload_state_dict", "offload_buffers"), _ONE_DEVICE),
    **dict.fromkeys(("tp_plan", "tp_size", "device_mesh"), _ONE_DEVICE),
    **dict.fromkeys(("use_safetensors", "from_tf", "from_flax"), _CONVERT),
    **dict.fromkeys(("experts_implementation", "key_mapping"), "dkv.load has nothing of the kind: leave it out"),
    "use_kernels": "dkv has kernels of its own (dkv.use_backend): leave it out",
    "variant": "the weights must be called model.safetensors, or as their index says: name the files so",
    "config": "the folder's config.json counts: change it there, in a copy of the folder",
    "generation_config": "give its settings to dkv.generate, or a dkv.DiffusionConfig",
    "state_dict": "for weights in memory there is dkv.wrap(hf_model)",
    "gguf_file": "only safetensors are read: pass the folder of the original weights",
    "use_auth_token": "pass token=",
    "ignore_mismatched_sizes": "every tensor must fit: take weights and config.json from the same place",
    "output_loading_info": "a tensor that is missing or left over is always an error: leave it out",
    "adapter_kwargs": "merge the adapter into its base model (peft: merge_and_unload), and load that",
    "proxies": "set HTTPS_PROXY in the environment",
    "resume_download": "downloads are always resumed: leave it out",
    "mirror": "set HF_ENDPOINT in the environment",
}


def hub_options(given: Mapping[str, Any], taken: Sequence[str]) -> dict[str, Any]:
    """The arguments for the hub's client; refuses those that would have no effect.

    Raises:
        TypeError: an unknown name; `taken` are those that the caller knows by itself.
        ValueError: a name of transformers that asks for something that is not done here.
    """
    for name, value in given.items():
        if name in HUB or name in GRANTED:
            continue
        if name not in ANSWERS:
            raise TypeError(f"unknown argument {name!r}: known are {', '.join((*taken, *HUB))}")
        # None and False ask for nothing; but safetensors are read anyway, and nothing else.
        nothing = name == "use_safetensors"
        if value is not None and value is not nothing:
            raise ValueError(f"{name}={value!r} is not supported: {ANSWERS[name]}")
    return {name: value for name, value in given.items() if name in HUB and value is not None}


def one_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    """The dtype asked for under either name, one of FLOATS, "auto" or None; ValueError: another, or they disagree."""
    asked = []
    for name, found in (("dtype", dtype), ("torch_dtype", torch_dtype)):
        if isinstance(found, str) and found != "auto":
            found = FLOATS.get(found.removeprefix("torch."), found)
        if found not in (None, "auto", *FLOATS.values()):
            raise ValueError(f"{name}={found!r} is not supported: pass 'auto' or one of {', '.join(FLOATS)}")
        asked.append(found)
    if None not in asked and asked[0] != asked[1]:
        raise ValueError(f"dtype={dtype!r} and torch_dtype={torch_dtype!r} disagree: pass dtype alone")
    return asked[1] if asked[0] is None else asked[0]


def one_device(device: Any, device_map: Any) -> Any:
    """The device that `device` or transformers' `device_map` asks for; None: the default one, which "auto" is, too.

    Raises ValueError if the map asks for several devices, or contradicts `device`.
    """
    if device_map is None:
        return device
    found = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    places = list(dict.fromkeys(map(str, found)))
    if len(places) != 1:
        raise ValueError(f"device_map names {len(places)} devices ({', '.join(places)}): {_ONE_DEVICE}")
    mapped = found[0]
    if mapped in ("balanced", "balanced_low_0", "sequential", "disk"):
        raise ValueError(f"device_map={device_map!r} is not supported: {_ONE_DEVICE}")
    if mapped == "auto":
        return device
    if device is not None and usable(device) != usable(mapped):
        raise ValueError(f"device={device!r} and device_map={device_map!r} disagree: pass device alone")
    return mapped


def usable(device: torch.device | str | int | None) -> torch.device:
    """The device, if a tensor can be put there; None: the current CUDA or ROCm device, or else the CPU.

    Raises ValueError if it does not exist here, or has no memory ("meta").
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    advice = f"pass {' or '.join(map(repr, ('cpu', *(f'cuda:{i}' for i in range(cards)))))}"
    shown = f"device={device if isinstance(device, int) else str(device)!r}"
    try:
        found, asked = torch.empty(0, device=device).device, torch.device(device)
    # Among others of a kind of device that this torch was not built for, or whose module is missing.
    except (RuntimeError, AssertionError, ImportError, TypeError, ValueError, OverflowError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"{shown} cannot be used here ({reason}): {advice}") from error
    if found.type == "meta":
        raise ValueError(f"{shown} holds no weights, only shapes: {advice}")
    if found.type == "cpu" and asked.index:
        raise ValueError(f"{shown} does not exist, there is one CPU: {advice}")
    return found
