"""Checkpoints into models: from a folder, the bundle or the hub.

No code of a checkpoint is run, and no weight is initialised only to be overwritten: the network is
built without storage, and takes the tensors of the file one by one.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from dkv.models.checkpoint import read_config, read_headers
from dkv.models.families import family_of
from dkv.models.files import damaged
from dkv.models.folders import folder_of
from dkv.models.headers import Entry
from dkv.models.keywords import hub_options, one_device, usable
from dkv.models.packing import can_pack, check_packable, pack_
from dkv.models.skeleton import fill, skeleton
from dkv.models.transformer import Transformer
from dkv.models.vocabulary import with_vocab_limit

FLOATS = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
# The same by the codes of safetensors headers.
CODES = dict(zip(("F16", "BF16", "F32", "F64"), FLOATS.values(), strict=True))
# Checkpoints of at least so many bytes show how far they are.
LARGE = 1 << 30


def load(
    path_or_id: str | os.PathLike,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    torch_dtype: torch.dtype | str | None = None,
    pack: bool | None = None,
    *,
    device_map: Any = None,
    subfolder: str | None = "",
    **keywords: Any,
) -> Transformer:
    """Load a LLaDA or Dream checkpoint for inference, without running code that comes with it.

    Everything that can be wrong with names, shapes and files is found before a tensor is read. Large
    checkpoints show a bar on a terminal.

    Args:
        path_or_id: "tiny" or "tiny-dream", the models that come with dkv, in LLaDA's and in Dream's
            format (a local folder of this name is "./tiny"); a folder with `config.json` and
            `model.safetensors` or its index and shards; or the id of a model on the Hugging Face hub
            ("org/name"), unless a folder of this name exists.
        dtype: of the parameters: a torch dtype, its name, or "auto" for the dtype of the file (that of
            its embedding table). None is "auto", except on a CPU, where half precision is slow and
            becomes float32.
        device: where the parameters go. None is the current CUDA or ROCm device, or else the CPU.
        torch_dtype: the older name of `dtype`.
        pack: hold the linear weights in the order in which a CPU multiplies them (`models/packing.py`):
            faster above all where few slots are active, but the weights cannot be moved, trained,
            quantised or saved by `dkv.models.export` before `dkv.unpack(model)`. None: where the model is
            float32 on a CPU that can.
        device_map: transformers' name for `device`; "auto" is the default device, as a model is never split.
        subfolder: the folder inside that holds the files.
        keywords: `revision`, `token`, `cache_dir`, `local_files_only` and `force_download` as in transformers, for
            models of the hub. Of the other arguments of its `from_pretrained` those that ask for what happens
            anyway are accepted (`trust_remote_code`: no code is run), the rest refused with what to do.

    Returns:
        The model in eval mode, its parameters frozen. Its vocabulary has as many ids as its tables
        have rows; where that is more than the tokenizer of the folder knows, `model.spec.vocab_limit` is
        the number of the tokenizer, and `dkv.generate` emits no id beyond.

    Raises:
        FileNotFoundError: a folder, a file or a hub model does not exist or cannot be reached.
        ValueError: an unknown family, a field that is not implemented, an adapter, or a checkpoint that is
            damaged or does not fit its configuration; the message names the tensor and the file.
        OSError: a file cannot be read.
        TypeError: an unknown argument, or a path that is none.
    """
    hub = hub_options(keywords, ("dtype", "device", "device_map", "torch_dtype", "pack", "subfolder"))
    if not (pack is None or isinstance(pack, bool)):
        raise ValueError(f"pack must be True, False or None, got {pack!r}")
    wanted, device = _one_dtype(dtype, torch_dtype), usable(one_device(device, device_map))
    folder = folder_of(path_or_id, subfolder=subfolder, **hub)
    config = read_config(folder)
    family = family_of(config)
    entries = read_headers(folder)
    places = {name: str(entry.file) for name, entry in entries.items()}
    shapes = {name: entry.shape for name, entry in entries.items()}
    model, names = skeleton(family, config, shapes, places, str(folder))
    model.spec = with_vocab_limit(model.spec, folder)
    for name in names.values():
        if entries[name].dtype not in CODES:
            raise ValueError(
                f"{name} in {entries[name].file} is stored as {entries[name].dtype}; only {', '.join(CODES)} are read: "
                "load the original weights, not quantised ones"
            )
    target = wanted
    if not isinstance(wanted, torch.dtype):
        target = CODES[entries[names["embed.weight"]].dtype]
        if wanted is None and device.type == "cpu":
            target = torch.promote_types(target, torch.float32)
    if pack is None:
        pack = device.type == "cpu" and target == torch.float32 and can_pack()
    elif pack:
        check_packable("the model", target, device)
    fill(model, names, _read({name: entries[name] for name in names.values()}, target, device))
    model.eval()
    return pack_(model) if pack else model


def _one_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    """The dtype asked for under either name: one of FLOATS, "auto" or None."""
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


def _read(entries: Mapping[str, Entry], dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, nn.Parameter]]:
    """The tensors, one at a time, file by file; each is converted before the next is read."""
    total = sum(entry.bytes for entry in entries.values())
    # None: where stderr is a terminal.
    with tqdm(total=total, desc="loading", unit="B", unit_scale=True, disable=True if total < LARGE else None) as bar:
        for file in sorted({entry.file for entry in entries.values()}):
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in sorted(name for name, entry in entries.items() if entry.file == file):
                        tensor = tensors.get_tensor(name).to(device=device, dtype=dtype)
                        yield name, nn.Parameter(tensor, requires_grad=False)
                        bar.update(entries[name].bytes)
            except SafetensorError as error:
                raise damaged(f"{file} cannot be read ({error})") from error
