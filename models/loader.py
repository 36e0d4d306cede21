"""Models from a checkpoint or from memory, without running code that comes with them.

No weight is initialised only to be overwritten: the network is built without storage, and takes the parameters one by
one.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from dkv.models.families import Family, family_of
from dkv.models.files import Entry, damaged
from dkv.models.folders import TOKENIZER_FILES, folder_of, read_config, read_headers
from dkv.models.foreign import behind_fronts, plain_parameters
from dkv.models.form import Asked, form_of
from dkv.models.gemma import Gemma
from dkv.models.gemma_spec import GemmaSpec
from dkv.models.keywords import FLOATS, hub_options, one_device, one_dtype, usable
from dkv.models.mixture import EXPERT_BIAS
from dkv.models.shards import Cut, device_of, read, share_
from dkv.models.skeleton import Pieces, fill, skeleton
from dkv.models.spec import ModelSpec
from dkv.models.special_ids import with_token_ids
from dkv.models.tokenizer import with_vocab_limit
from dkv.models.transformer import Transformer
from dkv.parallel import Ranks

# The dtypes that are read, by the codes of safetensors headers.
CODES = dict(zip(("F16", "BF16", "F32", "F64"), FLOATS.values(), strict=True))
# Arguments of `load`, for the message that refuses another.
NAMES = (
    *("dtype", "device", "device_map", "torch_dtype", "pack", "weights", "keep_head", "subfolder"),
    *("family", "mask_token_id", "attention_block", "ranks"),
)
# Checkpoints of at least so many bytes show how far they are.
LARGE = 1 << 30


def load(
    path_or_id: str | os.PathLike,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    torch_dtype: torch.dtype | str | None = None,
    pack: bool | None = None,
    *,
    weights: str | None = None,
    keep_head: bool = False,
    family: str | None = None,
    mask_token_id: int | None = None,
    attention_block: int | None = None,
    device_map: Any = None,
    subfolder: str | None = "",
    ranks: Ranks | None = None,
    **keywords: Any,
) -> Transformer | Gemma:
    """Load a checkpoint for inference, without running code that comes with it.

    Everything that can be wrong with names, shapes and files is found before a tensor is read. Large checkpoints show a
    bar on a terminal.

    Args:
        path_or_id: "tiny" or "tiny-dream", the models that come with dkv, in LLaDA's and in Dream's format (a local
            folder of this name is "./tiny"); a folder with `config.json` and `model.safetensors` or its index and
            shards; or the id of a model on the Hugging Face hub ("org/name"), unless a folder of this name exists.
        dtype: of the parameters: a torch dtype, its name, or "auto" for the dtype of the file (that of its embedding
            table). None is "auto", except on a CPU, where half precision is slow and becomes float32. The bias of a
            router is at least float32.
        device: where the parameters go. None is the current CUDA or ROCm device, or else the CPU.
        torch_dtype: the older name of `dtype`.
        pack: hold the linear weights in the order in which a CPU multiplies them (`models/packing.py`): faster above
            all where few slots are active, but the weights cannot be moved, trained, quantised or saved by
            `dkv.models.export` before `dkv.unpack(model)`. None: where the model is float32 on a CPU that can, or
            bfloat16 on one with instructions for it; elsewhere weights that multiply the same states are joined
            (`models/joining.py`). False: plain layers.
        weights: None: of `dtype`. "int8": those of all products as bytes, with a scale for each output. On a GPU
            activations stay in `dtype` ("int4" is for GPUs alone: 4 bits, with a scale for each output and at most 128
            inputs, the head in 8 bits). On a CPU, which must have VNNI, activations are rounded to bytes by token when
            they are multiplied, and are float32 elsewhere. Less memory, and not quite the same model: docs/devices.md.
        keep_head: with `weights`, leave the head in the dtype of the activations.
        family: of the model, where its configuration does not tell: "stable_diffcoder" for a plain Llama one.
        mask_token_id: where neither the configuration nor the tokenizer beside it say it; counts before both.
        attention_block: slots of the blocks in which the model was trained, if not as its configuration says: for
            A2D's BD3LM, whose files say nothing of blocks, and variants of SDAR.
        device_map: transformers' name for `device`; "auto" is the default device, as a model is never split.
        subfolder: the folder inside that holds the files.
        ranks: the processes that share the model, from `dkv.parallel.start()`: each calls this with the same arguments,
            and reads and holds its part alone (docs/devices.md).
        keywords: `revision`, `token`, `cache_dir`, `local_files_only` and `force_download` as in transformers, for
            models of the hub. Of the other arguments of its `from_pretrained` those that ask for what happens anyway
            are accepted (`trust_remote_code`: no code is run), the rest refused with what to do.

    Returns:
        The model in eval mode, its parameters frozen. Its vocabulary has as many ids as its tables have rows; where
        that is more than the tokenizer of the folder knows, `model.spec.vocab_limit` is the number of the tokenizer,
        and `dkv.generate` emits no id beyond.

    Raises:
        FileNotFoundError: a folder, a file or a hub model does not exist or cannot be reached.
        ValueError: an unknown family, a field that is not implemented, an adapter, or a checkpoint that is damaged or
            does not fit its configuration; the message names the tensor and the file. Or heads that cannot be split
            over the processes; the message has both numbers.
        OSError: a file cannot be read.
        TypeError: an unknown argument, or a path that is none.
    """
    hub = hub_options(keywords, NAMES)
    wanted, device = one_dtype(dtype, torch_dtype), one_device(device, device_map)
    device = usable(device) if ranks is None else device_of(ranks, device, pack, weights)
    asked = Asked(wanted, device, pack, weights, keep_head, shared=ranks is not None)
    folder = folder_of(path_or_id, subfolder=subfolder, **hub)
    kind, config = described(folder, family, mask_token_id, attention_block)
    entries = read_headers(folder)
    model, pieces = skeleton(kind, config, entries, str(folder))
    model.spec = with_vocab_limit(model.spec, folder)
    cuts: dict[str, Cut] = {}
    if ranks is not None:
        pieces, cuts = share_(model, ranks, kind, pieces)
    entries = _needed(entries, pieces)
    form = form_of(asked, model, CODES[entries[kind.weight_name("embed")].dtype])
    fill(model, pieces, _read(entries, form.dtype, form.device, cuts))
    return form.made(model.eval())


def _needed(entries: Mapping[str, Entry], pieces: Pieces) -> dict[str, Entry]:
    """The entries that a model has, as files may hold more; ValueError: one is of a dtype that is not read."""
    needed = {name: entries[name] for name in pieces}
    for name, entry in needed.items():
        if entry.dtype not in CODES:
            raise ValueError(
                f"{name} in {entry.file} is stored as {entry.dtype}; only {', '.join(CODES)} are read: "
                "load the original weights, not quantised ones"
            )
    return needed


def described(
    folder: Path, family: str | None, mask_token_id: int | None, attention_block: int | None
) -> tuple[Family, dict[str, Any]]:
    """The family of a folder, and its configuration with what the caller and the tokenizer say; arguments and errors as
    for `load`.
    """
    config = read_config(folder)
    kind = family_of(config, family)
    return kind, with_token_ids(kind.told(config, mask_token_id, attention_block), folder)


def spec_of(
    path_or_id: str | os.PathLike,
    family: str | None = None,
    mask_token_id: int | None = None,
    attention_block: int | None = None,
) -> ModelSpec | GemmaSpec:
    """What a model is, from its small files alone: no weight is read, or fetched from the hub; as for `load`."""
    folder = folder_of(path_or_id, TOKENIZER_FILES)
    kind, config = described(folder, family, mask_token_id, attention_block)
    return with_vocab_limit(kind.spec(config), folder)


def wrap(
    hf_model: nn.Module,
    *,
    family: str | None = None,
    mask_token_id: int | None = None,
    attention_block: int | None = None,
) -> Transformer | Gemma:
    """Share the parameters of a model that is already in memory.

    The result holds the very parameter objects of `hf_model`: training, moving or casting either model changes both.
    Nothing else is taken over: hooks of the original are not seen, and what computes beside the weights (LoRA and other
    adapters, parametrisations, quantised layers) is refused.

    Args:
        hf_model: a module with a `config` and the parameter names of its family, with or without their first component
            ("model."); also behind torch.compile or DistributedDataParallel.
        family, mask_token_id, attention_block: as for `load`.

    Returns:
        The model in eval mode, its parameters as frozen or trainable as they were. It does not know a tokenizer: give
        `dkv.generate` a `vocab_limit` if the tables are wider than that.

    Raises:
        TypeError: it is no module.
        ValueError: an unknown family, or a mixture of experts; adapters or other additions; parameters without storage,
            quantised, of several dtypes or on several devices; or names and shapes that do not fit the configuration.
    """
    if not isinstance(hf_model, nn.Module):
        raise TypeError(f"hf_model must be a model in memory, got {type(hf_model).__name__}: dkv.load takes a path")
    original = behind_fronts(hf_model)
    name = type(original).__name__
    if isinstance(original, Transformer | Gemma):
        raise ValueError("this model is dkv's already: use it as it is")
    parameters = plain_parameters(original, f"the {name} in memory")
    # Scalars of layers that transformers holds as buffers.
    scalars = (pair for pair in original.named_buffers() if pair[0].endswith("layer_scalar"))
    parameters |= {scalar: nn.Parameter(buffer, requires_grad=False) for scalar, buffer in scalars}
    found = getattr(original, "config", None)
    if found is None:
        raise ValueError(f"{name} has no config to tell its family: pass a model of transformers' kind")
    config = dict(found.to_dict() if hasattr(found, "to_dict") else getattr(found, "__dict__", found))
    kind = family_of(config, family)
    if kind.is_mixture:
        raise ValueError(
            f"a mixture of experts ({kind.name}) cannot be shared, as dkv holds all experts of a layer in one tensor: "
            "save the model (save_pretrained), and dkv.load the folder"
        )
    config = kind.told(config, mask_token_id, attention_block)
    roots = {name.partition(".")[0] for name in kind.names.values()}
    if not any(name.startswith("model.") for name in parameters):
        parameters = {n if n.partition(".")[0] in roots else f"model.{n}": p for n, p in parameters.items()}
    head, table = (kind.weight_name(module) for module in ("head", "embed"))
    if head in parameters and parameters[head] is parameters.get(table):
        config[kind.field_of("tied_head")] = True
        del parameters[head]
    model, pieces = skeleton(kind, config, parameters, f"the {name} in memory")
    fill(model, pieces, parameters.items())
    return model.eval()


def _read(
    entries: Mapping[str, Entry], dtype: torch.dtype, device: torch.device, cuts: Mapping[str, Cut]
) -> Iterator[tuple[str, nn.Parameter]]:
    """The tensors, one at a time, file by file; each is converted before the next is read. Of those that are cut no
    more is read than that.
    """
    total = sum(entry.bytes for entry in entries.values())
    # None: where stderr is a terminal.
    with tqdm(total=total, desc="loading", unit="B", unit_scale=True, disable=True if total < LARGE else None) as bar:
        for file in sorted({entry.file for entry in entries.values()}):
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in sorted(name for name, entry in entries.items() if entry.file == file):
                        kept = torch.promote_types(dtype, torch.float32) if name.endswith(EXPERT_BIAS) else dtype
                        tensor = read(tensors.get_slice(name), cuts[name]) if cuts else tensors.get_tensor(name)
                        tensor = tensor.to(device=device, dtype=kept)
                        yield name, nn.Parameter(tensor, requires_grad=False)
                        bar.update(entries[name].bytes)
            except SafetensorError as error:
                raise damaged(f"{file} cannot be read ({error})") from error
