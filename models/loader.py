"""Checkpoints into models: from a folder, the bundle or the hub, or from a model already in memory.

No code of a checkpoint is run, and no weight is initialised only to be overwritten: the network is
built without storage, and takes the tensors of the file one by one.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dkv.models.adapters import Family, family_of
from dkv.models.checkpoint import FETCH, Entry, read_config, read_headers, some
from dkv.models.packing import can_pack, pack_
from dkv.models.transformer import Transformer

BUNDLED = {name: Path(__file__).parent / name for name in ("tiny", "tiny-dream")}
FLOATS = {
    "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64,
}  # fmt: skip
# The same by the codes of safetensors headers.
CODES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
# What is fetched from the hub: no code, and no weights in other formats.
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]

log = logging.getLogger(__name__)


def load(
    path_or_id: str | os.PathLike,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    pack: bool | None = None,
) -> Transformer:
    """Load a LLaDA or Dream checkpoint for inference, without running code that comes with it.

    Everything that can be wrong with names, shapes and files is found before a tensor is read.

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
            faster above all where few slots are active, but the weights cannot be moved, trained or
            saved. None: where the model is float32 on a CPU that can.

    Returns:
        The model in eval mode, its parameters frozen. Its vocabulary has as many ids as its tables
        have rows; that can be more than the configuration or the tokenizer knows.

    Raises:
        FileNotFoundError: a folder, a file or a hub model does not exist or cannot be reached.
        ValueError: an unknown family, a field that is not implemented, or a checkpoint that is
            damaged or does not fit its configuration; the message names the tensor and the file.
    """
    wanted, device = _one_dtype(dtype, torch_dtype), _usable(device)
    folder = _folder(path_or_id)
    config = read_config(folder)
    family = family_of(config)
    entries = read_headers(folder)
    places = {name: str(entry.file) for name, entry in entries.items()}
    shapes = {name: entry.shape for name, entry in entries.items()}
    model, names = _skeleton(family, config, shapes, places, str(folder))
    dtypes = {name: _float_code(name, entries[name]) for name in names.values()}
    target = _target_dtype(wanted, dtypes[names["embed.weight"]], device)
    _fill(model, names, _read(entries, list(names.values()), target, device))
    model.eval()
    if pack is None:
        pack = device.type == "cpu" and target == torch.float32 and can_pack()
    return pack_(model) if pack else model


def wrap(hf_model: nn.Module) -> Transformer:
    """Share the parameters of a LLaDA or Dream model that is already in memory.

    The result holds the very parameter objects of `hf_model`: training, moving or casting either
    model changes both. Nothing else is taken over, so hooks and adapters (LoRA, offloading) of the
    original are not seen.

    Args:
        hf_model: a module with a `config` and the parameter names of its family, with or without
            their first component ("model.").

    Returns:
        The model in eval mode, its parameters as frozen or trainable as they were.

    Raises:
        ValueError: an unknown family; parameters without storage, quantised, or of several dtypes;
            or names and shapes that do not fit the configuration.
    """
    kind = type(hf_model).__name__
    config = getattr(hf_model, "config", None)
    if config is None:
        raise ValueError(f"{kind} has no config to tell its family: pass a LLaDA or Dream model")
    config = dict(config.to_dict() if hasattr(config, "to_dict") else vars(config))
    family = family_of(config)
    parameters = dict(hf_model.named_parameters(remove_duplicate=False))
    _check_in_memory(parameters)
    roots = {pattern.partition(".")[0] for pattern in family.names}
    if not any(name.startswith("model.") for name in parameters):
        parameters = {n if n.partition(".")[0] in roots else f"model.{n}": p for n, p in parameters.items()}
    head, table = (_weight_name(family, module) for module in ("head", "embed"))
    if head in parameters and parameters[head] is parameters.get(table):
        config[family.tied_field] = True
        del parameters[head]
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    model, names = _skeleton(family, config, shapes, {}, f"the {kind} in memory")
    _fill(model, names, parameters.items())
    return model.eval()


def _folder(path_or_id: str | os.PathLike) -> Path:
    """The local folder of a bundled name, a path or a hub id."""
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
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    # The hub's client raises several families of errors, its network library's among them.
    except Exception as error:
        raise FileNotFoundError(
            f"there is no folder {name}, and the hub did not deliver a model of this name ({error}): pass a local "
            f"folder, or check the name, the network and `hf auth login`, or run `hf download {name}` beforehand"
        ) from error


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


def _target_dtype(wanted: torch.dtype | str | None, stored: torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(wanted, torch.dtype):
        return wanted
    return torch.promote_types(stored, torch.float32) if wanted is None and device.type == "cpu" else stored


def _usable(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used here ({error}): pass 'cpu'") from error


def _weight_name(family: Family, module: str) -> str:
    name = f"{module}.weight"
    return family.checkpoint_names([name])[name]


def _skeleton(
    family: Family, config: dict, shapes: Mapping[str, tuple[int, ...]], places: Mapping[str, str], origin: str
) -> tuple[Transformer, dict[str, str]]:
    """A model without storage that fits the tensors, and the checkpoint names of its parameters.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape; `places` says in which file
            of `origin` it is.
    """
    model = _without_storage(family, config, shapes)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    names = family.checkpoint_names(expected)
    remedy = "check that weights and config.json belong together"
    if lost := [name for name in names.values() if name not in shapes]:
        raise ValueError(
            f"{origin} lacks tensors that its configuration asks for: {some(lost)}; "
            f"found {some(shapes) or 'none'}: {remedy}"
        )
    for ours, theirs in names.items():
        if shapes[theirs] != expected[ours]:
            raise ValueError(
                f"{theirs} in {places.get(theirs, origin)} has shape {list(shapes[theirs])}, but the configuration "
                f"asks for {list(expected[ours])}: {remedy}"
            )
    # Older files hold the rotary frequencies, which follow from the configuration.
    odd = sorted(name for name in shapes.keys() - names.values() if not name.endswith("inv_freq"))
    if odd:
        what = f"{model.spec.num_layers} layers and {'a tied' if model.spec.tied_head else 'its own'} head"
        raise ValueError(
            f"{places.get(odd[0], origin)} has unexpected tensors: {some(odd)}; the configuration describes "
            f"a {family.name} model with {what}: {remedy}"
        )
    return model, names


def _without_storage(family: Family, config: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> Transformer:
    """The model of a configuration, where the tensors fill in what that leaves open."""
    head, table = (_weight_name(family, module) for module in ("head", "embed"))
    config = {family.tied_field: head not in shapes} | {k: v for k, v in config.items() if v is not None}
    stated = config.get(family.rows_field, config.get("vocab_size"))
    rows = {shapes[name][0] for name in (head, table) if len(shapes.get(name, ())) == 2}
    if len(rows) == 1 and isinstance(stated, int) and max(rows) > stated:
        # Tables are often padded beyond the vocabulary.
        log.info("the tables have %d rows, and the configuration says %d: using all", max(rows), stated)
        config[family.rows_field] = max(rows)
    with torch.device("meta"):
        return Transformer(family.spec(config))


def _float_code(name: str, entry: Entry) -> torch.dtype:
    if entry.dtype not in CODES:
        raise ValueError(
            f"{name} in {entry.file} is stored as {entry.dtype}; only {', '.join(CODES)} are read: "
            "load the original weights, not quantised ones"
        )
    return CODES[entry.dtype]


def _read(
    entries: Mapping[str, Entry], names: Iterable[str], dtype: torch.dtype, device: torch.device
) -> Iterable[tuple[str, Tensor]]:
    """The named tensors, one at a time, file by file; each is converted before the next is read."""
    wanted = set(names)
    for file in sorted({entries[name].file for name in wanted}):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in sorted(name for name in wanted if entries[name].file == file):
                    tensor = tensors.get_tensor(name).to(device=device, dtype=dtype)
                    yield name, nn.Parameter(tensor, requires_grad=False)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}): {FETCH}") from error


def _fill(model: Transformer, names: Mapping[str, str], parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Put parameters, which come by their checkpoint names, in the place of those without storage."""
    ours = {theirs: name for name, theirs in names.items()}
    for theirs, parameter in parameters:
        if theirs in ours:
            module, _, leaf = ours[theirs].rpartition(".")
            setattr(model.get_submodule(module), leaf, parameter)
    if model.spec.tied_head:
        model.head.weight = model.embed.weight


def _check_in_memory(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters that a plain linear layer cannot compute with."""
    for name, p in parameters.items():
        if p.device.type == "meta":
            raise ValueError(f"{name} is on the meta device, without storage: load the weights first")
        if p.dtype not in FLOATS.values() or type(p.data) is not Tensor:
            raise ValueError(
                f"{name} is a {type(p.data).__name__} of {p.dtype}, and only plain tensors of {', '.join(FLOATS)} can "
                "be shared: wrap the model first, then quantise or distribute the result"
            )
    counts = Counter(p.dtype for p in parameters.values())
    if len(counts) > 1:
        found = ", ".join(f"{n} of {dtype}" for dtype, n in counts.items())
        raise ValueError(f"parameters of several dtypes cannot be shared ({found}): cast the model with .to(dtype)")
